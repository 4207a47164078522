"""`check-reference`: published numbers against this system, under any layout, on ranks it starts itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_deepstack.config.schema import ParallelConfig, Part, Precision
from megatron_deepstack.errors import DataError, ParityError
from megatron_deepstack.planning.routes import PlannedSample
from megatron_deepstack.planning.rows import context_length
from megatron_deepstack.planning.sequence import expand
from megatron_deepstack.planning.slots import decoder_slots, stage_chunks
from megatron_deepstack.planning.step_plan import StepPlan, plan_step
from megatron_deepstack.planning.tokens import IGNORE_INDEX
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.reference_case import ReferenceCase, load_case

LOGITS_TOLERANCE = 2e-5
"""Largest absolute error of a logit, float32."""
GRADIENT_TOLERANCE = 1e-4
"""Largest error of a gradient's entry, relative to the tensor's largest."""
LOSS_TOLERANCE = 1e-5
"""Largest relative error of the loss."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """How far a case is from the published numbers."""

    name: str
    logits_error: float
    loss_error: float
    gradient_error: float
    gradient_name: str

    @property
    def passed(self) -> bool:
        """Within all tolerances."""
        return (
            self.logits_error <= LOGITS_TOLERANCE
            and self.loss_error <= LOSS_TOLERANCE
            and self.gradient_error <= GRADIENT_TOLERANCE
        )

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        return (
            f"{verdict} {self.name}: logits {self.logits_error:.1e} absolute, loss {self.loss_error:.1e}, "
            f"gradients {self.gradient_error:.1e} relative, worst {self.gradient_name}"
        )


def check_cases(
    files: Sequence[str | Path], parallel: ParallelConfig, *, data_parallel: int = 1, micro_batch_size: int = 1
) -> Iterator[CaseResult]:
    """Compare each case under a layout, yielding results as they come. Starts and ends its own ranks.

    After the last result raises ParityError if a case exceeded a tolerance. Layouts that do not fit a case's model
    raise LayoutError or SlotError before any rank starts; files that cannot be read raise DataError.
    """
    cases = [load_case(path) for path in files]
    if not cases:
        raise DataError("check-reference: no case given; name NAME.safetensors files")
    for case in cases:
        decoder_slots(case.model)
        stage_chunks(case.model.language.num_layers, parallel)
    num_ranks = parallel.tensor * parallel.context * parallel.pipeline * data_parallel
    failed = []
    with RankPool(num_ranks) as pool:
        for case in cases:
            result = check_case(pool, case, parallel, micro_batch_size=micro_batch_size)
            if not result.passed:
                failed.append(case.name)
            yield result
    if failed:
        raise ParityError(
            f"{len(failed)} of {len(cases)} cases exceed the tolerances (logits {LOGITS_TOLERANCE:g}, loss "
            f"{LOSS_TOLERANCE:g}, gradients {GRADIENT_TOLERANCE:g}): {', '.join(failed)}"
        )


def check_case(pool: RankPool, case: ReferenceCase, parallel: ParallelConfig, micro_batch_size: int = 1) -> CaseResult:
    """Compare one case on ranks that are already there; their number fixes the data-parallel size."""
    result: CaseResult = pool.run(_check_on_rank, case, parallel, micro_batch_size)[0]
    return result


def _check_on_rank(rank: int, case: ReferenceCase, parallel: ParallelConfig, micro_batch_size: int) -> CaseResult:
    from megatron_deepstack.model.build import build_model, fill_model, freeze
    from megatron_deepstack.step.clock import StepClock
    from megatron_deepstack.step.engine import build_engine
    from megatron_deepstack.step.train_step import forward_backward
    from megatron_deepstack.testing.compare import gather_published, main_gradient, worst

    groups = groups_for(parallel)
    model = build_model(case.model, parallel, Precision.FP32, groups)
    fill_model(model, lambda name, shape: case.weights[name].reshape(shape), groups.decoder.tp)
    freeze(model, tuple(Part))
    engine = build_engine(model, case.model, parallel, groups)
    order = _deal(len(case.samples), groups.axes.dp, parallel, micro_batch_size)
    mine = order[groups.place.dp]
    batches = [[_planned(case, index) for index in batch] for batch in mine]
    plan = plan_step(case.model, parallel, batches, groups.replica_rank)
    pixels = _pixels(case, mine, plan)
    loss = forward_backward(engine, plan, pixels, StepClock())
    gradient_error, name = worst(gather_published(model, groups, main_gradient), case.grads)
    return CaseResult(
        name=case.name,
        logits_error=_logits_error(engine, plan, pixels, case, mine),
        loss_error=abs(loss.mean - case.loss) / abs(case.loss),
        gradient_error=gradient_error,
        gradient_name=name,
    )


_FILLER = -1
"""Index of the sample without targets that fills up the last micro-batches."""


def _deal(num_samples: int, dp: int, parallel: ParallelConfig, micro_batch_size: int) -> list[list[list[int]]]:
    """Sample indices by dp rank, micro-batch and place; equally many micro-batches, filled up with the filler."""
    per_rank = -(-num_samples // (dp * micro_batch_size))
    if parallel.virtual_pipeline > 1:
        per_rank = -(-per_rank // parallel.pipeline) * parallel.pipeline
    total = dp * per_rank * micro_batch_size
    indices = np.array([*range(num_samples), *[_FILLER] * (total - num_samples)])
    dealt: list[list[list[int]]] = indices.reshape(per_rank, dp, micro_batch_size).transpose(1, 0, 2).tolist()
    return dealt


def _planned(case: ReferenceCase, index: int) -> PlannedSample:
    if index == _FILLER:
        zeros = np.zeros(2, np.int64)
        return PlannedSample(sequence=expand("filler", zeros, zeros, (), seq_length=2, truncate=False), grids=())
    sample = case.samples[index]
    sequence = expand(
        f"{case.name}[{index}]",
        sample.tokens.numpy(),
        (sample.labels != IGNORE_INDEX).numpy().astype(np.int64),
        [context_length(case.model, grid) for grid in sample.grids],
        seq_length=case.max_tokens or 1 << 30,
        truncate=True,
    )
    return PlannedSample(sequence=sequence, grids=sample.grids)


def _pixels(case: ReferenceCase, mine: list[list[int]], plan: StepPlan) -> torch.Tensor:
    """Views of this rank's units; the format has one image per sample."""
    size = case.model.vision.image_size
    chosen = [torch.empty(0, 3, size, size)]
    for unit in plan.routes.units:
        pixels = case.samples[mine[unit.micro_batch][unit.sample]].pixel_values
        assert pixels is not None
        chosen.append(pixels[list(unit.views)])
    return torch.cat(chosen)


def _logits_error(
    engine: object, plan: StepPlan, pixels: torch.Tensor, case: ReferenceCase, mine: list[list[int]]
) -> float:
    """Largest absolute error of any logit at a sample's own positions, over all ranks."""
    import torch.distributed as dist

    from megatron_deepstack.parallel.context import gather_sequence
    from megatron_deepstack.parallel.reduce import gather_last_dim
    from megatron_deepstack.step.engine import Engine
    from megatron_deepstack.step.train_step import VisualPass

    assert isinstance(engine, Engine)
    logits = VisualPass(engine, plan, pixels).logits(plan)
    error = torch.zeros(1)
    for batch, local_BSV in zip(mine, logits, strict=False):
        full_BSV = gather_last_dim(local_BSV, engine.groups.decoder.tp)
        full_BSV = gather_sequence(full_BSV.transpose(0, 1), engine.groups.decoder.cp).transpose(0, 1)
        for index, ours in zip(batch, full_BSV, strict=True):
            if index != _FILLER:
                expected = case.logits[index]
                difference = (ours[: len(expected), : expected.shape[1]] - expected).abs().max()
                error = torch.maximum(error, torch.nan_to_num(difference, nan=float("inf")))
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    return float(error)
