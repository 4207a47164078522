"""One step of the 7B stage seen closely: its largest kernels, how long the GPU was idle, where the host waited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from megatron_deepstack.config.choices import Layers
from megatron_deepstack.planning.batch.step_plan import StepPlan
from megatron_deepstack.platform.compute.device import has_gpu, synchronize
from megatron_deepstack.platform.compute.measure import host_waits
from megatron_deepstack.testing.gpu.engine import what_is_missing
from megatron_deepstack.testing.gpu.report import Report, Settings
from megatron_deepstack.testing.gpu.stage import Stage, stage_size
from megatron_deepstack.testing.gpu.timing import only_rank
from megatron_deepstack.testing.gpu.traces import Event, idle_share, largest_kernels, record, runtime_calls

TRACE: Final = "trace.json.gz"
_KERNELS: Final = 10
_PLACES: Final = 12
_WATCHED_CALLS: Final = ("Synchronize", "Memcpy", "Launch")


def run(settings: Settings, report: Report) -> None:
    """Record a padded and a packed step of two micro-batches, so that the traces stay small.

    Transformer Engine's layers are used where they are installed.

    Args:
        settings: Size and folders of the trial; the first trace is kept in `output`.
        report: Gets rows about kernels, idle time, calls of CUDA and waits of the host.
    """
    size = replace(stage_size(tiny=settings.tiny), micro_batches=2)
    layers = Layers.LOCAL if what_is_missing() else Layers.TRANSFORMER_ENGINE
    stage = Stage(only_rank(settings), size, layers)
    plans = {
        f"padded, {layers}": stage.plan(size.seq_lengths[0]),
        f"packed, {layers}": stage.plan(size.seq_lengths[0], packed=True),
    }
    for index, (name, plan) in enumerate(plans.items()):
        with report.case(name):
            step = _step(stage, plan)
            step()
            step()
            file = (settings.output if index == 0 else settings.work) / TRACE
            _describe(report, name, record(step, file), micro_batches=size.micro_batches)
            _waits(report, name, stage, plan)


def _step(stage: Stage, plan: StepPlan) -> Callable[[], None]:
    def step() -> None:
        stage.forward_backward(plan, stage.rows(plan))
        stage.update()
        synchronize()

    return step


def _describe(report: Report, name: str, events: list[Event], micro_batches: int) -> None:
    idle = idle_share(events)
    if idle is None:
        report.left_out(f"idle share, {name}", "no GPU")
    else:
        report.measured(f"idle share, {name}", share=idle)
    calls = {
        call: count
        for call, count in runtime_calls(events).most_common()
        if any(word in call for word in _WATCHED_CALLS)
    }
    if calls:
        report.measured(f"CUDA calls, {name}", f"{micro_batches} micro-batches", **calls)
    for number, kernel in enumerate(largest_kernels(events, _KERNELS), start=1):
        report.measured(
            f"kernel {number}, {name}", kernel.name[:100], ms=kernel.microseconds / 1000, calls=kernel.calls
        )


def _waits(report: Report, name: str, stage: Stage, plan: StepPlan) -> None:
    """Of forward and backward, and of the update, apart."""
    if not has_gpu():
        report.left_out(f"host waits, {name}", "no GPU")
        return
    stored = stage.rows(plan)
    for what, found in (
        ("schedule", host_waits(lambda: stage.forward_backward(plan, stored))),
        ("update", host_waits(stage.update)),
    ):
        report.measured(f"host waits in the {what}, {name}", times=found.total())
        for place, count in found.most_common(_PLACES):
            report.measured(f"waits at, {name}", place, times=count)
