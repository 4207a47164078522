"""Megatron-Core's own pipeline schedules, driven with a step's micro-batches; they are not changed.

The schedule ends by finalising gradients. Ours must wait for the encoder's backward, so the schedule's call is left
empty here and `train_step` finalises afterwards.

Legend: B micro-batch, S sequence of this cp rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.model.language import HeadTargets, LanguageChunk, VisualInputs
from megatron_deepstack.model.layers.attention import Packs
from megatron_deepstack.model.layers.experts import membership_on_device
from megatron_deepstack.model.layers.key_value_cache import CachedStep
from megatron_deepstack.parallel.context import zigzag
from megatron_deepstack.planning.batch.members import membership
from megatron_deepstack.planning.batch.step_plan import StepPlan
from megatron_deepstack.planning.batch.targets import find_targets
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.platform.compute.device import local_device
from megatron_deepstack.platform.compute.upload import upload_all
from megatron_deepstack.step.timeline import FORWARD, Timeline

VisualOf = Callable[[int, int], VisualInputs]
"""(micro-batch, virtual stage) to what the chunk adds."""


@dataclass(slots=True)
class ScheduleResult:
    """What a schedule leaves on this rank; empty and zero except on the last stage."""

    num_tokens: torch.Tensor
    """Targets of this rank's micro-batches, a whole number on the device."""
    losses: list[torch.Tensor]
    """Per micro-batch the sum of token losses."""
    logits: list[torch.Tensor]
    """Per micro-batch (B, S, V / tp), where asked for."""


def run_schedule(
    config: TransformerConfig,
    chunks: Sequence[torch.nn.Module],
    plan: StepPlan,
    visual: VisualOf,
    *,
    cp_rank: int,
    forward_only: bool = False,
    keep_logits: bool = False,
    timeline: Timeline | None = None,
    uploaded: Sequence[torch.Tensor] | None = None,
) -> ScheduleResult:
    """Run all micro-batches through this rank's chunks. Collective over pp, tp and cp.

    Args:
        config: The decoder's; its hooks for the schedule are set here.
        chunks: This rank's chunks, wrapped or not, in the order of virtual stages.
        plan: The step of this rank's replica.
        visual: Asked once per forward for the rows that a chunk adds; those that require a gradient receive it.
        cp_rank: This rank's index on the context-parallel axis.
        forward_only: Whether to leave out the backward.
        keep_logits: Whether the last stage keeps logits in place of losses; only with `forward_only`.
        timeline: Where forwards and backwards are recorded, if they are.
        uploaded: `micro_batch_arrays` on the device; uploaded here if they are not given.

    Returns:
        On the last stage the losses or the logits; elsewhere nothing. Gradients are in the buffers of the chunks;
        `train_step` completes their reduction and divides them.
    """
    config.finalize_model_grads_func = _leave_to_train_step
    config.variable_seq_lengths = len(set(plan.seq_lengths)) > 1  # stages then send shapes before hidden states
    config.no_sync_func = None if forward_only else _no_sync(chunks)
    if uploaded is None:
        tp_rank = _unwrap(chunks[0]).tp_group.rank()
        uploaded = upload_all(micro_batch_arrays(plan, config, cp_rank=cp_rank, tp_rank=tp_rank))
    batches = _micro_batches(plan, uploaded, keep_logits=keep_logits)
    data = [iter(batches) for _ in range(len(chunks))]
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, visual, timeline),
        data_iterator=data if len(chunks) > 1 else data[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=plan.num_micro_batches,
        seq_length=plan.seq_lengths[0],
        micro_batch_size=plan.micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=keep_logits,
    )
    if keep_logits:
        return ScheduleResult(num_tokens=_sum([]), losses=[], logits=outputs)
    return ScheduleResult(
        num_tokens=_sum([count for _, count in outputs]), losses=[total for total, _ in outputs], logits=[]
    )


def run_cached_step(
    config: TransformerConfig,
    chunks: Sequence[torch.nn.Module],
    tokens: Sequence[np.ndarray],
    steps: Sequence[CachedStep],
    visual: VisualOf,
    *,
    cp_rank: int,
    axial: Sequence[np.ndarray] | None = None,
) -> list[torch.Tensor]:
    """Run some tokens of all micro-batches forward, after those that are in the caches. Collective over pp, tp and cp.

    Args:
        config: The decoder's.
        chunks: This rank's chunks.
        tokens: Per micro-batch int64 (B, W), the whole step's; all of one shape.
        steps: Per micro-batch where these tokens are. The caches take their keys and values.
        visual: Asked once per forward for the rows that a chunk adds.
        cp_rank: This rank's index on the context-parallel axis.
        axial: Per micro-batch int64 (3, B, W), the tokens' positions on three axes; None for a decoder without them.

    Returns:
        On the last stage, per micro-batch the wanted logits (B, V / tp); elsewhere nothing.
    """
    config.no_sync_func, config.variable_seq_lengths = None, False
    width = int(tokens[0].shape[1])
    positions = zigzag((width,), config.context_parallel_size, cp_rank)
    host = [np.stack(each)[..., positions] for each in (tokens, axial) if each is not None]
    tokens_MBS, *axial_M3BS = upload_all(host)
    batches = [
        _MicroBatch(
            number,
            tokens_MBS[number],
            targets=None,
            counted=None,
            packs=step,
            positions=axial_M3BS[0][number] if axial_M3BS else None,
        )
        for number, step in enumerate(steps)
    ]
    if config.pipeline_model_parallel_size == 1:
        # What Megatron's schedule prepares takes longer than a small model's token, and here it would pass nothing on.
        with torch.no_grad():
            return [_forward(chunks[0], batch, visual(batch.number, 0))[0] for batch in batches]
    data = [iter(batches) for _ in range(len(chunks))]
    with torch.no_grad():
        outputs: list[torch.Tensor] = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, visual, None),
            data_iterator=data if len(chunks) > 1 else data[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            seq_length=width,
            micro_batch_size=int(tokens[0].shape[0]),
            forward_only=True,
            collect_non_loss_data=True,
        )
    return [logits_B1V[:, 0] for logits_B1V in outputs]


def _sum(counts: list[torch.Tensor]) -> torch.Tensor:
    """On the device: reading a count would make the host wait for its micro-batch."""
    return torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.int64, device=local_device())


def _no_sync(chunks: Sequence[torch.nn.Module]) -> Any:
    """What the schedule enters for all backwards of a chunk except the last, whose gradients are reduced as they come.

    One context for one chunk, a list for several, as the schedules want it; None where nothing is trained.
    """
    contexts = [chunk.no_sync for chunk in chunks if isinstance(chunk, DistributedDataParallel)]
    return contexts if len(contexts) > 1 else next(iter(contexts), None)


def _leave_to_train_step(*_: object, **__: object) -> None:
    """In place of Megatron's finalisation, which must come after the encoder's backward."""


@dataclass(frozen=True, slots=True)
class _MicroBatch:
    number: int
    tokens: torch.Tensor
    targets: HeadTargets | None
    counted: torch.Tensor | None
    """(1, N) boolean, which of the targets' losses count."""
    packs: Packs | CachedStep | None
    positions: torch.Tensor | None
    membership: torch.Tensor | None = None
    """Whose the tokens are, where experts are to be balanced."""


def micro_batch_arrays(plan: StepPlan, config: TransformerConfig, *, cp_rank: int, tp_rank: int) -> list[np.ndarray]:
    """What all micro-batches of a step need on the device, so that nothing is sent there while the schedule runs.

    Args:
        plan: The step of this rank's replica.
        config: The decoder's.
        cp_rank: This rank's index on the context-parallel axis.
        tp_rank: This rank's index on the tensor-parallel axis.

    Returns:
        Arrays of whole numbers by kind, each kind once per micro-batch: tokens, rows and labels of targets, and where
        there are such the positions on three axes and the bounds of packs.
    """
    ends = plan.segments or tuple((length,) for length in plan.seq_lengths)
    own = [zigzag(one, config.context_parallel_size, cp_rank) for one in ends]
    bounds = [np.array((0, *one), np.int64) for one in plan.segments or ()]
    kinds = [plan.tokens, plan.labels, *([plan.positions] if plan.positions else [])]
    mine = [array[..., places] for arrays in kinds for array, places in zip(arrays, own, strict=True)]
    count = plan.num_micro_batches
    tokens, labels, axial = mine[:count], mine[count : 2 * count], mine[2 * count :]
    pieces = config.tensor_model_parallel_size if config.sequence_parallel else 1
    piece = tp_rank if config.sequence_parallel else 0
    targets = [find_targets(one, pieces) for one in labels]
    rows, of_rows = [one.rows[piece] for one in targets], [one.labels.reshape(1, -1) for one in targets]
    owners, sizes = _owners(plan, config, [np.split(places, pieces)[piece] for places in own])
    return [*tokens, *rows, *of_rows, *axial, *bounds, *owners, *sizes]


def _owners(
    plan: StepPlan, config: TransformerConfig, held: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Whose the tokens are and how large each sample is, of each micro-batch; nothing for a decoder without experts."""
    if config.num_moe_experts is None:
        return [], []
    found = [membership(one, plan.micro_batch_size, places) for one, places in zip(plan.members, held, strict=True)]
    return [owners for owners, _ in found], [sizes for _, sizes in found]


def _micro_batches(plan: StepPlan, uploaded: Sequence[torch.Tensor], *, keep_logits: bool) -> list[_MicroBatch]:
    """From `micro_batch_arrays` on the device."""
    count = plan.num_micro_batches
    kinds = [uploaded[first : first + count] for first in range(0, len(uploaded), count)]
    tokens_M, rows_M, labels_M, *more = kinds
    positions_M = more.pop(0) if plan.positions else None
    bounds_M = more.pop(0) if plan.segments else None
    owners_M, sizes_M = more or (None, None)
    return [
        _MicroBatch(
            number=number,
            tokens=tokens_M[number],
            targets=None if keep_logits else HeadTargets(rows_M[number], labels_M[number].clamp(min=0)),
            counted=labels_M[number] != IGNORE_INDEX,
            packs=Packs.of(plan.segments[number], bounds_M[number].int()) if plan.segments and bounds_M else None,
            positions=positions_M[number] if positions_M else None,
            membership=membership_on_device(owners_M[number], sizes_M[number]) if owners_M and sizes_M else None,
        )
        for number in range(count)
    ]


def _forward_step(
    visual: VisualOf, timeline: Timeline | None, data: Iterator[_MicroBatch], model: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    batch = next(data)
    vpp = _unwrap(model).chunk.vpp
    inputs = visual(batch.number, vpp)
    with nullcontext() if timeline is None else timeline.part(FORWARD, batch.number, vpp):
        output = _forward(model, batch, inputs)
    if timeline is not None:
        timeline.watch_backward(output, batch.number, vpp)
    return output, partial(_loss, batch.counted)


def _forward(model: torch.nn.Module, batch: _MicroBatch, inputs: VisualInputs) -> torch.Tensor:
    output: torch.Tensor = model(batch.tokens, batch.targets, inputs, batch.packs, batch.positions, batch.membership)
    return output


def _unwrap(model: torch.nn.Module) -> LanguageChunk:
    while not isinstance(model, LanguageChunk):
        model = model.module  # type: ignore[assignment]
    return model


def _loss(counted_1N: torch.Tensor | None, output: torch.Tensor, non_loss_data: bool = False) -> Any:
    """Sum of token losses, number of targets, and the same for the log; or the logits as they are."""
    if non_loss_data:
        return output.transpose(0, 1)
    assert counted_1N is not None, "a step for its loss has targets"
    total = (output.float() * counted_1N).sum()
    count = counted_1N.sum().to(torch.int)
    return total, count, (total.detach(), count)
