"""The 7B stage's steps, variant by variant: rows, stacks, packing, fusions, recomputation, FP8, and the optimizer."""

from __future__ import annotations

from megatron_deepstack.config.choices import (
    Layers,
    MomentDtype,
    OptIn,
    Precision,
    Recompute,
    RecomputeModule,
    Switch,
)
from megatron_deepstack.config.schema import OptimizerConfig, ParallelConfig, SpeedConfig
from megatron_deepstack.model.build import AUTOMATIC
from megatron_deepstack.platform.compute.measure import release_memory
from megatron_deepstack.testing.gpu.engine import what_is_missing
from megatron_deepstack.testing.gpu.report import Report, Settings
from megatron_deepstack.testing.gpu.stage import Stage, stage_size
from megatron_deepstack.testing.gpu.timing import mean_seconds, only_rank, read_ceiling


def run_local(settings: Settings, report: Report) -> None:
    """Measure Megatron's local layers with torch's attention.

    Args:
        settings: Size and folders of the trial.
        report: Gets a row for each variant of the step.
    """
    _measure(settings, report, Layers.LOCAL)


def run_engine(settings: Settings, report: Report) -> None:
    """Measure Transformer Engine's layers, and the same in FP8.

    Args:
        settings: Size and folders of the trial.
        report: Gets a row for each variant of the step, or one that says what is missing.
    """
    missing = what_is_missing()
    if missing:
        report.left_out("7B stage, Transformer Engine's layers", missing)
        return
    _measure(settings, report, Layers.TRANSFORMER_ENGINE)


def _measure(settings: Settings, report: Report, layers: Layers) -> None:
    """The stage as it is first, then what needs another stage: the first one's memory is given back before."""
    groups, size, ceiling = only_rank(settings), stage_size(tiny=settings.tiny), read_ceiling(settings)
    longest, *others = size.seq_lengths
    stage = Stage(groups, size, layers)
    variants = {
        f"rows of {longest}": stage.plan(longest),
        f"rows of {longest}, no stacks": stage.plan(longest, stacks=False),
        f"rows of {longest}, packed": stage.plan(longest, packed=True),
        **{f"rows of {length}": stage.plan(length) for length in others},
    }
    for name, plan in variants.items():
        with report.case(name):
            report.measured(name, **stage.speed(plan).numbers(ceiling))
    with report.case("optimizer step"):
        report.measured("optimizer step", ms=1000 * mean_seconds(stage.update, repeats=3, warm_up=1))
    del stage
    release_memory()
    _without_fusions(settings, report, layers)
    release_memory()
    name = f"rows of {longest}, full recomputation"
    with report.case(name):
        stage = Stage(groups, size, layers, parallel=ParallelConfig(recompute=Recompute.FULL))
        report.measured(name, **stage.speed(stage.plan(longest)).numbers(ceiling))
        del stage
    if layers is Layers.TRANSFORMER_ENGINE:
        release_memory()
        name = f"rows of {longest}, fp8 tensorwise"
        with report.case(name):
            stage = Stage(groups, size, layers, precision=Precision.FP8)
            report.measured(name, **stage.speed(stage.plan(longest)).numbers(ceiling))
            del stage
        release_memory()
        _low_moments(settings, report)
    _kept_and_captured(settings, report, layers)


def _kept_and_captured(settings: Settings, report: Report, layers: Layers) -> None:
    """What autograd keeps elsewhere or computes again, and layers as CUDA graphs, where these layers can do it."""
    groups, size, ceiling = only_rank(settings), stage_size(tiny=settings.tiny), read_ceiling(settings)
    longest, host = size.seq_lengths[0], size.language.num_layers // 2
    variants = {f"{host} layers on the host": (ParallelConfig(offload_layers=host), AUTOMATIC)}
    if layers is Layers.LOCAL:
        again = ParallelConfig(recompute=Recompute.SELECTIVE, recompute_modules=(RecomputeModule.LAYER_NORM,))
        variants["norms computed again"] = again, AUTOMATIC
    else:
        variants["CUDA graphs"] = ParallelConfig(), SpeedConfig(cuda_graphs=OptIn.ALWAYS)
    for what, (parallel, speed) in variants.items():
        release_memory()
        name = f"rows of {longest}, {what}"
        with report.case(name):
            stage = Stage(groups, size, layers, parallel=parallel, speed=speed)
            report.measured(name, **stage.speed(stage.plan(longest)).numbers(ceiling))
            del stage


def _low_moments(settings: Settings, report: Report) -> None:
    """The optimizer step with moments in both formats, and the bytes of the states that it keeps."""
    groups, size = only_rank(settings), stage_size(tiny=settings.tiny)
    for moments in MomentDtype:
        name = f"optimizer step, distributed, {moments} moments"
        with report.case(name):
            optimizer = OptimizerConfig(moment_dtype=moments, beta2=0.95)
            parallel = ParallelConfig(distributed_optimizer=True)
            stage = Stage(groups, size, Layers.TRANSFORMER_ENGINE, parallel=parallel, optimizer=optimizer)
            milliseconds = 1000 * mean_seconds(stage.update, repeats=3, warm_up=1)
            report.measured(name, ms=milliseconds, states_GB=stage.state_bytes() / 1e9)
            del stage
        release_memory()


def _without_fusions(settings: Settings, report: Report, layers: Layers) -> None:
    """The same stage with all fusions switched off, padded and packed; the rows before had those that are `auto`."""
    groups, size, ceiling = only_rank(settings), stage_size(tiny=settings.tiny), read_ceiling(settings)
    length = size.seq_lengths[0]
    with report.case("unfused stage"):
        stage = Stage(groups, size, layers, speed=SpeedConfig(fusions=Switch.NEVER))
        for name, packed in ((f"rows of {length}, unfused", False), (f"rows of {length}, packed, unfused", True)):
            with report.case(name):
                report.measured(name, **stage.speed(stage.plan(length, packed=packed)).numbers(ceiling))
        with report.case("optimizer step, unfused"):
            report.measured("optimizer step, unfused", ms=1000 * mean_seconds(stage.update, repeats=3, warm_up=1))
