"""Which row goes to which rank: one rank's side of a step's exchange, planned by that rank alone.

A row is a feature vector of hidden size made by the rank that encodes its view. It is added at one position of one
micro-batch before one layer, so its destination is the rank whose pipeline stage owns the slot and whose sequence
shard (cp zigzag chunk, tp shard under sequence parallelism) holds the position. With tp but no sequence parallelism
all tp ranks of the stage add the row; their gradients are equal and only tp rank 0 returns one.

A rank looks only at rows that it sends or receives, so the work does not grow with the number of ranks. Both sides
find the same order by themselves: what one rank sends another is ordered by micro-batch, slot, sample, image, and then
as `rows.image_rows` lists an image's rows. `testing.route_table` plans all ranks at once, by definition, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_deepstack.config.choices import EncoderPlacement
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig
from megatron_deepstack.planning.batch.sequence import ExpandedSample, SequenceShards
from megatron_deepstack.planning.exchange.image_plan import image_plan
from megatron_deepstack.planning.exchange.route_sides import (
    ChunkRows,
    Index,
    ReplicaPlace,
    StepImage,
    count_by_rank,
    local_rows,
    overlapping,
    receive,
    send,
    send_to_self,
    store,
)
from megatron_deepstack.planning.exchange.rows import tokens_per_view
from megatron_deepstack.planning.slots import EMBEDDING, Chunk, chunk_slots, decoder_slots, stage_chunks
from megatron_deepstack.planning.views import Grid


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A sample as the planner sees it."""

    sequence: ExpandedSample
    grids: tuple[Grid, ...]
    """Grid of each image, in order of appearance."""


@dataclass(frozen=True, slots=True)
class EncodeUnit:
    """One view to encode (DeepStack-V: one image, whose views meet inside the ViT)."""

    micro_batch: int
    sample: int
    """Index within the micro-batch."""
    image: int
    """Index within the sample."""
    views: tuple[int, ...]
    """Views the unit reads: one, or all of the image."""


@dataclass(frozen=True, slots=True)
class RankRoutes:
    """One rank's side of the exchange. Sizes are rows; positions are `s * B + b` in the rank's own shard."""

    units: tuple[EncodeUnit, ...]
    """What this rank encodes; unit u yields local rows u * tokens_per_view onwards; the newline is the last row."""
    num_units: int
    """Units of the whole replica, each counted once."""
    num_replica_rows: int
    """Rows that the units of the whole replica make; newlines not counted."""
    num_local_rows: int
    """Rows of the local table, the newline included."""
    send_rows: Index
    """Local rows to send, by destination."""
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]
    """Rows received, by origin."""
    stored_rows: Index
    """The received rows as the chunks add them, one stretch for each of `chunks` in order: for each stored row its
    place in the order of arrival, or `num_received` for a row of zeros. Each received row is stored once."""
    returns_gradients: bool
    """Whether the gradients of this rank's received rows go back: of several tp ranks that add the same rows, tp rank
    0 answers."""
    returned_rows: Index
    """Local rows whose gradients come back, by sender."""
    returned_splits: tuple[int, ...]
    chunks: dict[tuple[int, int], ChunkRows]
    """By (micro-batch, virtual stage); absent where nothing is added."""

    @property
    def num_received(self) -> int:
        """Rows this rank receives."""
        return sum(self.receive_splits)

    @property
    def return_splits(self) -> tuple[int, ...]:
        """Gradients sent back, by the rank that they go to."""
        return self.receive_splits if self.returns_gradients else (0,) * len(self.receive_splits)


def plan_routes(
    model: ModelConfig,
    parallel: ParallelConfig,
    micro_batches: Sequence[Sequence[PlannedSample]],
    seq_length: int,
    rank: int,
) -> RankRoutes:
    """Plan one rank's side of the exchange of a step.

    Views that some row needs are dealt to ranks in order and evenly, since all cost the same. With
    `encoder_placement: inline` nothing travels: the ranks of stage 0 encode their own micro-batches, and every row's
    source is its destination.

    Args:
        model: The model.
        parallel: The layout; tp x cp x pp ranks make a replica.
        micro_batches: The replica's samples, the same on all of its ranks, all micro-batches of one size.
        seq_length: S, the padded length of all samples, which `sequence_multiple(parallel)` divides.
        rank: Replica rank, `tp + tensor * (cp + context * pp)`.

    Returns:
        The rank's side. Pure: what another rank plans fits without a word.
    """
    place, view_tokens = _place(parallel, seq_length, rank), tokens_per_view(model.vision)
    images = _images(model, micro_batches)
    num_units = images[-1].stop_unit if images else 0
    bounds = np.array([num_units * k // place.num_ranks for k in range(place.num_ranks + 1)])
    mine = range(int(bounds[rank]), int(bounds[rank + 1]))
    if place.inline:
        mine = range(num_units if place.pp == 0 else 0)
    chunks, slots = stage_chunks(model.language.num_layers, parallel), decoder_slots(model)
    by_stage = [[chunk for chunk in chunks if chunk.pp == pp] for pp in range(parallel.pipeline)]
    slots_of_stage = [_slots_of(stage, slots) for stage in by_stage]
    received = receive(place, images, slots_of_stage[place.pp], bounds, view_tokens)
    stored = store(received, by_stage[place.pp], slots)
    sent = send_to_self(place, received.row) if place.inline else send(place, images, slots_of_stage, mine, view_tokens)
    num_local = len(mine) * view_tokens + 1
    send_rows = local_rows(sent.rows, mine.start * view_tokens, num_local)
    returned = send_rows
    if sent.returned is not sent.rows:
        returned = local_rows(sent.returned, mine.start * view_tokens, num_local)
    uses = np.bincount(returned, minlength=num_local)
    assert uses[:-1].max(initial=0) <= 1, "a row other than the newline has two gradients"
    return RankRoutes(
        units=_encode_units(images, mine),
        num_units=num_units,
        num_replica_rows=num_units * view_tokens,
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


def _place(parallel: ParallelConfig, seq_length: int, rank: int) -> ReplicaPlace:
    rest, tp = divmod(rank, parallel.tensor)
    pp, cp = divmod(rest, parallel.context)
    return ReplicaPlace(
        rank=rank,
        num_ranks=parallel.tensor * parallel.context * parallel.pipeline,
        tp=tp,
        cp=cp,
        pp=pp,
        tensor=parallel.tensor,
        shards=SequenceShards.of(parallel, seq_length),
        inline=parallel.encoder_placement is EncoderPlacement.INLINE,
        returns=parallel.sequence_parallel or tp == 0,
    )


def _images(model: ModelConfig, micro_batches: Sequence[Sequence[PlannedSample]]) -> list[StepImage]:
    """All images of a step that have a row, in order."""
    images, unit = [], 0
    for m, samples in enumerate(micro_batches):
        for b, sample in enumerate(samples):
            for span in sample.sequence.spans:
                plan = image_plan(model, sample.grids[span.image], span.length)
                if plan.units:
                    images.append(StepImage(m, len(samples), b, span.image, span.start, span.length, unit, plan))
                    unit += len(plan.units)
    return images


def _slots_of(stage: Sequence[Chunk], slots: Sequence[int]) -> tuple[int, ...]:
    """The slots of a stage's chunks, EMBEDDING included, by virtual stage and so ascending."""
    embedding = (EMBEDDING,) if any(chunk.has_embedding for chunk in stage) else ()
    return (*embedding, *(slot for chunk in stage for slot in chunk_slots(chunk, slots)))


def _encode_units(images: Sequence[StepImage], mine: range) -> tuple[EncodeUnit, ...]:
    return tuple(
        EncodeUnit(micro_batch=image.micro_batch, sample=image.sample, image=image.image, views=views)
        for image in overlapping(images, mine)
        for number, views in enumerate(image.plan.units, start=image.first_unit)
        if number in mine
    )
