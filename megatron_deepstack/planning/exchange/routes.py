"""Which row goes to which rank: one rank's side of a step's exchange, planned by that rank without communication.

A row is a feature vector of hidden size, made by the rank that encodes its view. It is added at one position of one
micro-batch before one layer. So its destination is the rank whose pipeline stage owns the slot, and whose sequence
shard (zigzag pieces over cp, split over tp under sequence parallelism) holds the position. With tp but without sequence
parallelism all tp ranks of the stage add the row; their gradients are equal, and only tp rank 0 returns one.

A rank plans only rows that it sends or receives, so its work does not grow with the number of ranks. Sender and
receiver compute the same order: rows from one rank to another are ordered by micro-batch, slot, sample and image, and
then as `rows.image_rows` lists the rows of an image. `testing.route_table` plans all ranks at once, directly from this
definition, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_deepstack.config.choices import EncoderPlacement
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig
from megatron_deepstack.planning.batch.sequence import ExpandedSample, SequenceShards, Span
from megatron_deepstack.planning.budget.cost import unit_flops
from megatron_deepstack.planning.exchange.dealing import Dealt, deal_by_cost, deal_in_order, imbalance
from megatron_deepstack.planning.exchange.image_plan import ImagePlan, image_plan
from megatron_deepstack.planning.exchange.route_sides import (
    ChunkRows,
    Index,
    ReplicaPlace,
    StepImage,
    arrange,
    count_by_rank,
    local_rows,
    overlapping,
    receive,
    send,
    send_to_self,
)
from megatron_deepstack.planning.exchange.rows import unit_rows
from megatron_deepstack.planning.slots import EMBEDDING, Chunk, chunk_slots, decoder_slots, stage_chunks
from megatron_deepstack.planning.views import ImageShape, ViewGrid


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A sample or a pack, with all that the plan needs to know about it."""

    sequence: ExpandedSample
    """Its tokens and labels, and the positions of its images."""
    grids: tuple[ImageShape, ...]
    """What determines the rows of each image, in order of appearance: the grid of its crops, or its patches."""


@dataclass(frozen=True, slots=True)
class EncodeUnit:
    """One view to encode, or for DeepStack-V one image, whose views are encoded together."""

    micro_batch: int
    """Number of the micro-batch."""
    sample: int
    """Index within the micro-batch."""
    image: int
    """Index within the sample."""
    views: tuple[int, ...]
    """Numbers of the views that the unit reads: one, or all of the image."""
    grid: ViewGrid | None = None
    """The patches of the view, if views have different sizes."""


@dataclass(frozen=True, slots=True)
class RankRoutes:
    """One rank's side of the exchange. Splits count rows; positions are `s * B + b` in the rank's own shard."""

    units: tuple[EncodeUnit, ...]
    """The units that this rank encodes. Unit u makes the local rows from `first_rows[u]` on, and the newline is the
    last local row."""
    first_rows: Index
    """(units + 1,): the first local row of each unit, and at the end that of the newline."""
    num_units: int
    """Number of units of the whole replica, each counted once."""
    grids: tuple[ViewGrid, ...]
    """The patches of each unit of the whole replica, if views have any size."""
    imbalance: float
    """FLOPs of the rank of the replica that has most to encode, over the mean of all ranks; 1 if all have the same."""
    num_replica_rows: int
    """Number of rows that the units of the whole replica make, without newlines."""
    num_local_rows: int
    """Number of rows of this rank's table, including the newline."""
    send_rows: Index
    """Local rows to send, by destination."""
    send_splits: tuple[int, ...]
    """Number of rows sent to each rank."""
    receive_splits: tuple[int, ...]
    """Number of rows received from each rank."""
    stored_rows: Index
    """The received rows as the chunks add them, for one entry of `chunks` after another. Each number is the place of a
    row in the order of arrival, or `num_received` for a row of zeros. Each received row occurs once."""
    returns_gradients: bool
    """Whether this rank returns the gradients of its received rows. If several tp ranks add the same rows, only tp rank
    0 does."""
    returned_rows: Index
    """Local rows whose gradients come back, by the rank that returns them."""
    returned_splits: tuple[int, ...]
    """Number of gradients that come back from each rank."""
    chunks: dict[tuple[int, int], ChunkRows]
    """The rows of each (micro-batch, virtual stage); left out if there are none."""

    @property
    def num_received(self) -> int:
        """Number of rows that this rank receives."""
        return sum(self.receive_splits)

    @property
    def return_splits(self) -> tuple[int, ...]:
        """Number of gradients that this rank returns to each rank."""
        return self.receive_splits if self.returns_gradients else (0,) * len(self.receive_splits)


def plan_routes(
    model: ModelConfig,
    parallel: ParallelConfig,
    micro_batches: Sequence[Sequence[PlannedSample]],
    seq_lengths: Sequence[int],
    rank: int,
    segments: Sequence[tuple[int, ...]] | None = None,
) -> RankRoutes:
    """Plan one rank's side of the exchange of a step.

    The views that rows need are divided among ranks: in order and evenly if all cost the same, otherwise by their
    estimated FLOPs. With `encoder_placement: inline` no row is sent to another rank: the ranks of stage 0 encode all
    views themselves, and the source of every row is its destination.

    Args:
        model: The model.
        parallel: The layout; tp x cp x pp ranks make a replica.
        micro_batches: The replica's samples, the same on all of its ranks; all micro-batches have the same size.
        seq_lengths: S of each micro-batch, the padded length of its samples, a multiple of
            `sequence_multiple(parallel)`.
        rank: Replica rank, `tp + tensor * (cp + context * pp)`.
        segments: For each micro-batch the ends of the pack's samples, which cp splits one by one; None without packs.

    Returns:
        The rank's side. The function is pure, so the sides of all ranks fit together.
    """
    place = _place(parallel, seq_lengths, segments, rank)
    images, dealt = _images(model, micro_batches, place)
    bounds, num_units, shapes = dealt.bounds, int(dealt.bounds[-1]), _shapes(images, micro_batches)
    inline = range(num_units if place.pp == 0 else 0)
    mine = inline if place.inline else range(int(bounds[rank]), int(bounds[rank + 1]))
    chunks, slots = stage_chunks(model.language.num_layers, parallel), decoder_slots(model)
    by_stage = [[chunk for chunk in chunks if chunk.pp == pp] for pp in range(parallel.pipeline)]
    slots_of_stage, has_base = [_slots_of(stage, slots) for stage in by_stage], model.variant.traits.has_base_rows
    received = receive(place, images, slots_of_stage[place.pp], bounds, has_base_rows=has_base)
    stored = arrange(received, by_stage[place.pp], slots)
    sent = send_to_self(place, received.row) if place.inline else send(place, images, slots_of_stage, mine)
    first_rows = dealt.first_row[mine.start : mine.stop + 1] - dealt.first_row[mine.start]
    first_row, num_local = int(dealt.first_row[mine.start]), int(first_rows[-1]) + 1
    send_rows = local_rows(sent.rows, first_row, num_local)
    returned = send_rows if sent.returned is sent.rows else local_rows(sent.returned, first_row, num_local)
    uses = np.bincount(returned, minlength=num_local)
    assert uses[:-1].max(initial=0) <= 1, "a row other than the newline has two gradients"
    return RankRoutes(
        units=_encode_units(images, mine, micro_batches),
        first_rows=first_rows,
        num_units=num_units,
        grids=tuple(shape for shape in shapes if isinstance(shape, ViewGrid)),
        imbalance=_imbalance(model, images, shapes, bounds),
        num_replica_rows=int(dealt.first_row[-1]),
        num_local_rows=num_local,
        send_rows=send_rows,
        send_splits=sent.splits,
        receive_splits=count_by_rank(received.source, place.num_ranks),
        stored_rows=stored.rows,
        returns_gradients=place.returns,
        returned_rows=returned,
        returned_splits=sent.returned_splits,
        chunks=stored.chunks,
    )


def _shapes(images: Sequence[StepImage], micro_batches: Sequence[Sequence[PlannedSample]]) -> list[ImageShape]:
    return [micro_batches[image.micro_batch][image.sample].grids[image.image] for image in images]


def _imbalance(model: ModelConfig, images: Sequence[StepImage], shapes: Sequence[ImageShape], bounds: Index) -> float:
    costs = [unit_flops(model, shape) for shape in shapes]
    return imbalance(costs, [range(image.first_unit, image.stop_unit) for image in images], bounds)


def _place(
    parallel: ParallelConfig,
    seq_lengths: Sequence[int],
    segments: Sequence[tuple[int, ...]] | None,
    rank: int,
) -> ReplicaPlace:
    rest, tp = divmod(rank, parallel.tensor)
    pp, cp = divmod(rest, parallel.context)
    return ReplicaPlace(
        rank=rank,
        num_ranks=parallel.tensor * parallel.context * parallel.pipeline,
        tp=tp,
        cp=cp,
        pp=pp,
        tensor=parallel.tensor,
        context=parallel.context,
        tp_shards=parallel.tensor if parallel.sequence_parallel else 1,
        shards=tuple(
            SequenceShards.of(parallel, length, ends)
            for length, ends in zip(seq_lengths, segments or [()] * len(seq_lengths), strict=True)
        ),
        inline=parallel.encoder_placement is EncoderPlacement.INLINE,
        returns=parallel.sequence_parallel or tp == 0,
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """An image of a step that has a row."""

    micro_batch: int
    batch_size: int
    sample: int
    span: Span
    shape: ImageShape
    plan: ImagePlan


def _images(
    model: ModelConfig, micro_batches: Sequence[Sequence[PlannedSample]], place: ReplicaPlace
) -> tuple[list[StepImage], Dealt]:
    """Return all images of a step that have a row, in order, and the numbers of their units."""
    found = []
    for m, samples in enumerate(micro_batches):
        for b, sample in enumerate(samples):
            for span in sample.sequence.spans:
                shape = sample.grids[span.image]
                plan = image_plan(model, shape, span.length)
                if plan.units:
                    found.append(_Found(m, len(samples), b, span, shape, plan))
    num_rows = [unit_rows(model, one.shape) for one in found]
    if model.variant.traits.is_native and not place.inline:
        dealt = deal_by_cost([unit_flops(model, one.shape) for one in found], num_rows, place.num_ranks)
    else:
        dealt = deal_in_order([len(one.plan.units) for one in found], num_rows, place.num_ranks)
    images = [
        StepImage(
            micro_batch=one.micro_batch,
            batch_size=one.batch_size,
            sample=one.sample,
            image=one.span.image,
            start=one.span.start,
            length=one.span.length,
            first_unit=int(first),
            first_row=int(dealt.first_row[first]),
            plan=one.plan,
        )
        for one, first in zip(found, dealt.first_unit, strict=True)
    ]
    return images, dealt


def _slots_of(stage: Sequence[Chunk], slots: Sequence[int]) -> tuple[int, ...]:
    """Return the slots of a stage's chunks, including EMBEDDING, by virtual stage, which is ascending."""
    embedding = (EMBEDDING,) if any(chunk.has_embedding for chunk in stage) else ()
    return (*embedding, *(slot for chunk in stage for slot in chunk_slots(chunk, slots)))


def _encode_units(
    images: Sequence[StepImage], mine: range, micro_batches: Sequence[Sequence[PlannedSample]]
) -> tuple[EncodeUnit, ...]:
    units = []
    for image in overlapping(images, mine):
        shape = micro_batches[image.micro_batch][image.sample].grids[image.image]
        grid = shape if isinstance(shape, ViewGrid) else None
        for number, views in enumerate(image.plan.units, start=image.first_unit):
            if number in mine:
                units.append(EncodeUnit(image.micro_batch, image.sample, image.image, views, grid))
    return tuple(units)
