"""One rank's part of `check-reference`: build the case's model, run a step, compare with what was published."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from megatron_deepstack.config.choices import Part, Precision
from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.model.build import build_model, fill_model, freeze
from megatron_deepstack.parallel.context import gather_sequence
from megatron_deepstack.parallel.reduce import gather_last_dim
from megatron_deepstack.planning.batch.packing import filler
from megatron_deepstack.planning.batch.sequence import expand
from megatron_deepstack.planning.batch.step_plan import StepPlan, plan_step
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.planning.exchange.routes import PlannedSample
from megatron_deepstack.planning.exchange.rows import context_length
from megatron_deepstack.step.clock import StepClock
from megatron_deepstack.step.engine import Engine, build_engine
from megatron_deepstack.step.train_step import VisualPass, forward_backward
from megatron_deepstack.testing.compare import gather_published, main_gradient, worst
from megatron_deepstack.testing.published.case_result import CaseResult
from megatron_deepstack.testing.published.reference_case import ReferenceCase
from megatron_deepstack.testing.ranks import groups_for


def check_on_rank(rank: int, case: ReferenceCase, parallel: ParallelConfig, micro_batch_size: int) -> CaseResult:
    """Compute a case and compare it with the published numbers. Collective over all ranks of the pool.

    Args:
        rank: Number of this rank.
        case: The case.
        parallel: The layout.
        micro_batch_size: Samples of a micro-batch.

    Returns:
        How far it is from the published numbers; the same on every rank.
    """
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
        return filler()
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
    engine: Engine, plan: StepPlan, pixels: torch.Tensor, case: ReferenceCase, mine: list[list[int]]
) -> float:
    """Largest absolute error of any logit at a sample's own positions, over all ranks."""

    logits = VisualPass(engine, plan, pixels).logits(plan)
    error, num_compared = torch.zeros(1), torch.zeros(1)
    for batch, local_BSV in zip(mine, logits, strict=True) if logits else ():  # only the last stage has logits
        full_BSV = gather_last_dim(local_BSV, engine.groups.decoder.tp)
        full_BSV = gather_sequence(full_BSV.transpose(0, 1), engine.groups.decoder.cp).transpose(0, 1)
        for index, ours in zip(batch, full_BSV, strict=True):
            if index != _FILLER:
                expected = case.logits[index]
                difference = (ours[: len(expected), : expected.shape[1]] - expected).abs().max()
                error = torch.maximum(error, torch.nan_to_num(difference, nan=float("inf")))
                num_compared += 1
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    dist.all_reduce(num_compared)
    copies = engine.groups.axes.tp * engine.groups.axes.cp
    assert num_compared == copies * len(case.samples), f"{int(num_compared)} of {copies} x {len(case.samples)} compared"
    return float(error)
