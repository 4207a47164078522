"""One rank's part of `check-parity`: the folder's model in the asked layout, and how far it is from transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_deepstack.config.choices import Part, Precision
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig
from megatron_deepstack.config.sizes import sample_multiple
from megatron_deepstack.convert.hf_names import Naming, to_naming
from megatron_deepstack.convert.hf_whole import used_tensors
from megatron_deepstack.convert.published import published_source
from megatron_deepstack.convert.stacked_experts import is_of_expert
from megatron_deepstack.convert.tensor_files import files_by_name, read_tensor
from megatron_deepstack.model.build import build_model, fill_model, freeze
from megatron_deepstack.parallel.context import gather_sequence
from megatron_deepstack.parallel.reduce import gather_last_dim
from megatron_deepstack.planning.batch.packing import filler, merge, padded_sample_length
from megatron_deepstack.planning.batch.step_plan import StepPlan, plan_step
from megatron_deepstack.planning.exchange.routes import PlannedSample
from megatron_deepstack.step.clock import StepClock
from megatron_deepstack.step.engine import Engine, build_engine
from megatron_deepstack.step.train_step import VisualPass, forward_backward
from megatron_deepstack.testing.compare import gather_published, main_gradient, relative_error
from megatron_deepstack.testing.parity.drawn import DrawnSample
from megatron_deepstack.testing.ranks import groups_for

NOISE_SHARE = 1e-3
"""Share of the largest entry of all gradients below which a tensor's own largest entry is no scale: such a tensor holds
rounding noise, as the gradients of key biases do, which are zero in exact arithmetic."""
EXPECTED = "expected.safetensors"


@dataclass(frozen=True, slots=True)
class ParityTask:
    """What the ranks compare."""

    folder: Path
    model: ModelConfig
    parallel: ParallelConfig
    micro_batch_size: int
    samples: tuple[DrawnSample, ...]
    packed: bool
    expected: Path
    """A file with transformers' logits (`logits.0`, ...), and gradients under published names."""


@dataclass(frozen=True, slots=True)
class ParityNumbers:
    """What the ranks found; the same on every rank."""

    logits: tuple[float, ...]
    """Per sample the largest absolute error of a logit over the largest logit, or over 1 if that is smaller."""
    loss: float
    weights: tuple[str, ...]
    """Names of the folder's tensors that would not be written back as they are."""
    gradients: dict[str, float]
    """Published name to the largest error of an entry over the tensor's largest; infinite if one side has no tensor."""


def compare_on_rank(rank: int, task: ParityTask) -> ParityNumbers:
    """Compute the samples in the layout and compare them. Collective over all ranks of the pool.

    Args:
        rank: Number of this rank.
        task: What to compare.

    Returns:
        The errors, and the loss.
    """
    groups = groups_for(task.parallel)
    model = build_model(task.model, task.parallel, Precision.FP32, groups)
    fill_model(model, published_source(task.folder, model=task.model), groups.decoder.tp)
    freeze(model, tuple(Part))
    weights = _not_written_back(gather_published(model, groups, lambda parameter: parameter), task)
    engine = build_engine(model, task.model, task.parallel, groups)
    rows = _rows(task, groups.axes.dp)[groups.place.dp]
    planned = [[_planned(task, row) for row in batch] for batch in rows]
    plan = plan_step(task.model, task.parallel, planned, groups.replica_rank, packed=task.packed)
    pixels = _pixels(task, rows, plan)
    loss = forward_backward(engine, plan, pixels, StepClock())
    expected = load_file(task.expected)
    errors = _gradient_errors(gather_published(model, groups, main_gradient), expected)
    logits = _logits_errors(engine, plan, pixels, task, rows, expected)
    return ParityNumbers(logits=logits, loss=loss.mean, weights=weights, gradients=errors)


def _not_written_back(ours: dict[str, torch.Tensor], task: ParityTask) -> tuple[str, ...]:
    """Names of the folder's tensors that an export would not have, or not bit for bit, and of those it would add."""
    files = used_tensors(files_by_name(task.folder), task.model)
    experts = {name: tensor for name, tensor in ours.items() if is_of_expert(name)}
    read = published_source(task.folder, model=task.model)
    wrong_experts = [name for name, own in experts.items() if not torch.equal(read(name, tuple(own.shape)), own)]
    files = {name: file for name, file in files.items() if "mlp.experts." not in name}  # in either of their forms
    others = {name: tensor for name, tensor in ours.items() if name not in experts}
    written = {to_naming(name, Naming.HUGGING_FACE, task.model): tensor for name, tensor in others.items()}
    if task.model.language.tied_embeddings:
        files = {name: file for name, file in files.items() if not name.startswith("lm_head.")}
    wrong = [name for name in files if name not in written or not _same(written[name], read_tensor(files[name], name))]
    return tuple(wrong_experts + wrong + [name for name in written if name not in files])


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.numel() == theirs.numel() and torch.equal(ours.reshape(theirs.shape), theirs.float())


Row = tuple[int, ...]
"""Samples of one row of a micro-batch: one, several in a pack, or none in a filler."""


def _rows(task: ParityTask, dp: int) -> list[list[list[Row]]]:
    """Rows by dp rank, micro-batch and place, filled up to equal numbers."""
    every = [(tuple(range(len(task.samples))),)] if task.packed else None
    size = 1 if task.packed else task.micro_batch_size
    flat: list[Row] = list(every[0]) if every else [(index,) for index in range(len(task.samples))]
    per_rank = -(-len(flat) // (dp * size))
    if task.parallel.virtual_pipeline > 1:
        per_rank = -(-per_rank // task.parallel.pipeline) * task.parallel.pipeline
    flat += [()] * (dp * per_rank * size - len(flat))
    batches = [flat[first : first + size] for first in range(0, len(flat), size)]
    return [batches[rank * per_rank : (rank + 1) * per_rank] for rank in range(dp)]


def _planned(task: ParityTask, row: Row) -> PlannedSample:
    members = [task.samples[index].planned(task.model) for index in row]
    if task.packed:
        least = sample_multiple(task.parallel)
        return merge(members, least) if members else filler(least)
    return members[0] if members else filler()


def _pixels(task: ParityTask, rows: Sequence[Sequence[Row]], plan: StepPlan) -> torch.Tensor:
    """The views that this rank encodes: of one size (N, side, side, 3), otherwise all values in one dimension."""
    side, native = task.model.vision.image_size, task.model.variant.traits.is_native
    chosen = [np.empty((0,) if native else (0, side, side, 3), np.uint8)]
    for unit in plan.routes.units:
        images = [image for index in rows[unit.micro_batch][unit.sample] for image in task.samples[index].pixels]
        image = images[unit.image]
        chosen.append(image.reshape(-1) if native else image[list(unit.views)])
    return torch.from_numpy(np.concatenate(chosen))


def _gradient_errors(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    theirs = {name: value for name, value in expected.items() if not name.startswith("logits.")}
    # what no row passes does not learn here, such as a tower's layers after the last tapped one
    theirs = {name: value for name, value in theirs.items() if name in ours or value.any()}
    floor = NOISE_SHARE * max(float(value.abs().max()) for value in theirs.values())
    return {
        name: relative_error(ours[name], theirs[name], floor) if name in ours and name in theirs else float("inf")
        for name in dict.fromkeys((*theirs, *ours))
    }


def _logits_errors(
    engine: Engine,
    plan: StepPlan,
    pixels: torch.Tensor,
    task: ParityTask,
    rows: Sequence[Sequence[Row]],
    expected: dict[str, torch.Tensor],
) -> tuple[float, ...]:
    """Errors of each sample's logits, over all ranks."""
    logits = VisualPass(engine, plan, pixels).logits(plan)
    errors = torch.full((len(task.samples),), -1.0)
    ends = plan.segments or (None,) * len(rows)
    least = sample_multiple(task.parallel) if task.packed else 1
    for batch, own_ends, local_BSV in zip(rows, ends, logits, strict=True) if logits else ():  # of the last stage only
        full_BSV = gather_last_dim(local_BSV, engine.groups.decoder.tp)
        full_BSV = gather_sequence(full_BSV.transpose(0, 1), engine.groups.decoder.cp, own_ends).transpose(0, 1)
        for row, ours_SV in zip(batch, full_BSV, strict=True):
            begin = 0
            for index in row:
                theirs = expected[f"logits.{index}"]
                own = ours_SV[begin : begin + len(theirs), : theirs.shape[1]]
                begin += padded_sample_length(len(theirs), least)
                errors[index] = relative_error(own, theirs, floor=1.0)
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    assert bool((errors >= 0).all()), "the logits of a sample were compared on no rank"
    return tuple(errors.tolist())
