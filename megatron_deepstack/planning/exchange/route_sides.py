"""The two sides of one rank's exchange: what it receives, as its chunks add it, and what it sends.

Each side lists its rows in one order, that of `blocks`: by micro-batch, slot, sample and image. A sender sorts them by
destination, a receiver by origin, both keeping that order among rows of the same rank, so the two agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from megatron_deepstack.planning.batch.sequence import SequenceShards, Stretch
from megatron_deepstack.planning.exchange.image_plan import NEWLINE_ROW, ImagePlan, SlotRows
from megatron_deepstack.planning.slots import EMBEDDING, Chunk, chunk_slots

Index = npt.NDArray[np.int64]
Kept = slice | npt.NDArray[np.bool_]
"""Which rows of a block."""
_EVERYTHING, _NOTHING = slice(None), slice(0)


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """What one chunk adds in one micro-batch: a stretch of the rank's stored rows.

    `base_rows` and `slot_rows` are that stretch of `RankRoutes.stored_rows`: base rows first, then slot by slot.
    `slot_rows` and `slot_positions` are (slots of the chunk, R), R being the longest; shorter ones are filled with
    the index one past the last received row (a row of zeros) at position 0.
    """

    first: int
    """Where the stretch begins in `RankRoutes.stored_rows`."""
    base_rows: Index
    base_positions: Index
    slot_rows: Index
    slot_positions: Index


@dataclass(frozen=True, slots=True)
class ReplicaPlace:
    """A rank of the replica, and what decides which rows it looks at."""

    rank: int
    """Within the replica: tp + tensor * (cp + context * pp)."""
    num_ranks: int
    """Of the replica."""
    tensor: int
    """Size of tp."""
    tp: int
    cp: int
    pp: int
    shards: SequenceShards
    inline: bool
    """The encoder runs where its rows are added, so nothing travels."""
    returns: bool
    """Gradients of its received rows go back."""


@dataclass(frozen=True, slots=True)
class StepImage:
    """One image of a step."""

    micro_batch: int
    batch_size: int
    sample: int
    image: int
    start: int
    """First position of its context in the sequence."""
    length: int
    """Positions left after truncation."""
    first_unit: int
    """Number of its first unit among all of the replica."""
    plan: ImagePlan

    @property
    def stop_unit(self) -> int:
        """One past its last unit."""
        return self.first_unit + len(self.plan.units)


def overlapping(images: Sequence[StepImage], mine: range) -> list[StepImage]:
    """The images of which one of these units is a part."""
    return [image for image in images if image.first_unit < mine.stop and mine.start < image.stop_unit]


def blocks(images: Sequence[StepImage], slots: Sequence[int]) -> Iterator[tuple[StepImage, SlotRows]]:
    """Each image's rows for each slot, in the order of the exchange."""
    for _, group in groupby(images, key=lambda image: image.micro_batch):
        together = [(image, {rows.slot: rows for rows in image.plan.slots}) for image in group]
        for slot in slots:
            for image, by_slot in together:
                if slot in by_slot:
                    yield image, by_slot[slot]


@dataclass(frozen=True, slots=True)
class Received:
    """The rows of a rank in the order of the exchange, whatever rank they come from."""

    position: Index
    source: npt.NDArray[np.uint16]
    row: Index
    """Row counted from the replica's first unit, or NEWLINE_ROW; empty but for the encoder inline."""
    counts: dict[tuple[int, int], int]
    """Rows by (micro-batch, slot), in the order of the exchange."""


def receive(
    place: ReplicaPlace, images: Sequence[StepImage], slots: Sequence[int], bounds: Index, view_tokens: int
) -> Received:
    """List the rows that one rank receives.

    Args:
        place: The rank.
        images: All images of the step.
        slots: The slots of the rank's stage, by virtual stage.
        bounds: int64 (ranks + 1,): where the units of each rank begin, and their number at the end.
        view_tokens: Rows of a unit.

    Returns:
        The rows, in the order of `blocks`.
    """
    stretches = place.shards.stretches(place.cp, place.tp)
    positions, sources, rows = [np.empty(0, np.int64)], [np.empty(0, np.uint16)], [np.empty(0, np.int64)]
    counts: dict[tuple[int, int], int] = {}
    for image, block in blocks(images, slots):
        kept, local = _own_cells(image, block, stretches)
        if not len(local):
            continue
        positions.append(local * image.batch_size + image.sample)
        if place.inline:
            sources.append(np.full(len(local), place.rank, np.uint16))
            rows.append(_replica_rows(image, block.row[kept], view_tokens))
        else:
            sources.append(_sources(image, block.unit[kept], bounds))
        key = image.micro_batch, block.slot
        counts[key] = counts.get(key, 0) + len(local)
    return Received(np.concatenate(positions), np.concatenate(sources), np.concatenate(rows), counts)


def _own_cells(image: StepImage, block: SlotRows, stretches: Sequence[Stretch]) -> tuple[Kept, Index]:
    """Which of a block's rows lie in this rank's shard, and their positions there."""
    stop = image.start + image.length
    met = [one for one in stretches if one.first < stop and image.start < one.stop]
    if not met:
        return _NOTHING, np.empty(0, np.int64)
    if met[0].first <= image.start and stop <= met[0].stop:
        return _EVERYTHING, block.cell + np.int64(image.start - met[0].first + met[0].local)
    position = block.cell + np.int64(image.start)
    parts = [(one, (position >= one.first) & (position < one.stop)) for one in met]
    kept = np.logical_or.reduce([inside for _, inside in parts])
    local = position.copy()
    for one, inside in parts:
        local[inside] += one.local - one.first
    return kept, local[kept]


def _sources(image: StepImage, unit: npt.NDArray[np.int32], bounds: Index) -> npt.NDArray[np.uint16]:
    """Ranks that make the rows of these units; ranks' units begin at `bounds`."""
    owners = np.searchsorted(bounds, np.arange(image.first_unit, image.stop_unit), side="right") - 1
    if owners[0] == owners[-1]:
        return np.full(len(unit), owners[0], np.uint16)
    found: npt.NDArray[np.uint16] = owners.astype(np.uint16)[unit]
    return found


def _replica_rows(image: StepImage, row: npt.NDArray[np.int32], view_tokens: int) -> Index:
    """Rows counted from the replica's first unit, the newline left as it is."""
    return np.where(row == NEWLINE_ROW, NEWLINE_ROW, row + np.int64(image.first_unit * view_tokens))


@dataclass(frozen=True, slots=True)
class Sent:
    """What a rank sends, by destination, rows counted from the replica's first unit; `returned` come back."""

    rows: Index
    splits: tuple[int, ...]
    """Rows sent to each rank."""
    returned: Index
    returned_splits: tuple[int, ...]
    """Gradients that come back from each rank."""


def send(
    place: ReplicaPlace,
    images: Sequence[StepImage],
    slots_of_stage: Sequence[Sequence[int]],
    mine: range,
    view_tokens: int,
) -> Sent:
    """List the rows that one rank sends, and those whose gradients come back.

    Args:
        place: The rank.
        images: All images of the step.
        slots_of_stage: The slots of each stage, by virtual stage.
        mine: Numbers of the units that the rank encodes.
        view_tokens: Rows of a unit.

    Returns:
        The rows by destination; those of one destination in the order of `blocks`.
    """
    own = overlapping(images, mine)
    copies = place.tensor // place.shards.tp_shards
    num_shards = place.shards.context * place.shards.tp_shards
    rows_of, returned, splits, returned_splits = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [], []
    for slots in slots_of_stage:
        rows, shards = [np.empty(0, np.int64)], [np.empty(0, np.uint16)]
        for image, block in blocks(own, slots):
            kept = _of_units(image, block, mine)
            rows.append(_replica_rows(image, block.row[kept], view_tokens))
            if num_shards > 1:
                shards.append(place.shards.shard_of(block.cell[kept] + np.int64(image.start)).astype(np.uint16))
        ordered = np.concatenate(rows)
        counts: tuple[int, ...] = (len(ordered),)
        if num_shards > 1:
            shard = np.concatenate(shards)
            ordered, counts = ordered[_order(shard)], count_by_rank(shard, num_shards)
        for part, count in zip(np.split(ordered, np.cumsum(counts)[:-1]), counts, strict=True):
            rows_of += [part] * copies
            splits += [count] * copies
            returned.append(part)
            returned_splits += [count] + [0] * (copies - 1)
    together = np.concatenate(returned)
    return Sent(
        rows=together if copies == 1 else np.concatenate(rows_of),
        splits=tuple(splits),
        returned=together,
        returned_splits=tuple(returned_splits),
    )


def send_to_self(place: ReplicaPlace, rows: Index) -> Sent:
    """With the encoder inline: all that a rank receives, from itself."""
    splits = tuple(len(rows) if rank == place.rank else 0 for rank in range(place.num_ranks))
    if place.returns:
        return Sent(rows, splits, rows, splits)
    return Sent(rows, splits, rows[:0], (0,) * place.num_ranks)


def _of_units(image: StepImage, block: SlotRows, mine: range) -> Kept:
    """The rows of a block that the units of this rank make."""
    if mine.start <= image.first_unit and image.stop_unit <= mine.stop:
        return _EVERYTHING
    return (block.unit >= mine.start - image.first_unit) & (block.unit < mine.stop - image.first_unit)


def _order(keys: npt.NDArray[np.uint16]) -> Index:
    """A stable order by small keys; of 16-bit numbers it is a radix sort, so its time is linear."""
    if not len(keys) or keys.min() == keys.max():
        return np.arange(len(keys))
    return np.argsort(keys, kind="stable")


def local_rows(rows: Index, first_row: int, num_local: int) -> Index:
    """Rows of the local table, whose last is the newline, from rows counted from the replica's first unit."""
    local = np.where(rows == NEWLINE_ROW, num_local - 1, rows - first_row)
    assert not len(local) or 0 <= local.min() <= local.max() < num_local, "a route names a row its rank does not make"
    return local


def count_by_rank(ranks: npt.NDArray[np.uint16], num_ranks: int) -> tuple[int, ...]:
    """How often each rank occurs."""
    return tuple(np.bincount(ranks, minlength=num_ranks).tolist())


@dataclass(frozen=True, slots=True)
class Stored:
    """A rank's received rows as its chunks add them; see `RankRoutes.stored_rows`."""

    rows: Index
    chunks: dict[tuple[int, int], ChunkRows]


def store(received: Received, chunks: Sequence[Chunk], slots: Sequence[int]) -> Stored:
    """Lay the rows of each chunk and micro-batch out as the chunk adds them, in the order of the exchange."""
    order = _order(received.source)
    arrival = np.empty_like(order)
    arrival[order] = np.arange(len(order))
    sizes = _stretch_sizes(received.counts, chunks, slots)
    num_stored = sum(base + len(stacked) * max(stacked, default=0) for base, stacked in sizes.values())
    rows, positions = np.full(num_stored, len(order)), np.zeros(num_stored, np.int64)
    found, first, taken = {}, 0, 0
    for key, (base, stacked) in sizes.items():
        longest = max(stacked, default=0)
        stop = first + base + len(stacked) * longest
        begin = first
        for size, room in ((base, base), *((size, longest) for size in stacked)):
            rows[begin : begin + size] = arrival[taken : taken + size]
            positions[begin : begin + size] = received.position[taken : taken + size]
            begin, taken = begin + room, taken + size
        found[key] = ChunkRows(
            first=first,
            base_rows=rows[first : first + base],
            base_positions=positions[first : first + base],
            slot_rows=rows[first + base : stop].reshape(len(stacked), longest),
            slot_positions=positions[first + base : stop].reshape(len(stacked), longest),
        )
        first = stop
    assert taken == len(order), "a row arrived at a stage that does not own its slot"
    return Stored(rows, found)


def _stretch_sizes(
    counts: dict[tuple[int, int], int], chunks: Sequence[Chunk], slots: Sequence[int]
) -> dict[tuple[int, int], tuple[int, list[int]]]:
    """By (micro-batch, virtual stage): base rows and rows of each slot; without those that add nothing."""
    found = {}
    for m in dict.fromkeys(m for m, _ in counts):
        for chunk in chunks:
            base = counts.get((m, EMBEDDING), 0) if chunk.has_embedding else 0
            stacked = [counts.get((m, slot), 0) for slot in chunk_slots(chunk, slots)]
            if base + sum(stacked):
                found[m, chunk.vpp] = base, stacked
    return found
