"""The two sides of one rank's exchange: the rows that it receives, as its chunks add them, and the rows that it sends.

Each side lists its rows in the order of `blocks`: by micro-batch, slot, sample and image. A sender sorts them by
destination and a receiver by origin. Both sorts keep the order of `blocks` among rows of one rank, so they agree.
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
"""A selection of the rows of a block."""
_EVERYTHING, _NOTHING = slice(None), slice(0)
_NO_ROWS = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """The rows that one chunk adds in one micro-batch, which are neighbours among the rank's stored rows.

    `base_rows` and `slot_rows` are parts of `RankRoutes.stored_rows`: base rows first, then slot by slot. R is the
    largest number of rows of a slot. Slots with fewer rows are padded with a row of zeros at position 0; its index is
    one past the last received row.
    """

    first: int
    """Index of the first of these rows in `RankRoutes.stored_rows`."""
    base_rows: Index
    """(number of base rows,), indices of received rows in the order of arrival, or that of a row of zeros."""
    base_positions: Index
    """(number of base rows,), positions `s * B + b` in the rank's shard."""
    slot_rows: Index
    """(slots of the chunk, R), indices of received rows."""
    slot_positions: Index
    """(slots of the chunk, R), positions `s * B + b` in the rank's shard."""


@dataclass(frozen=True, slots=True)
class ReplicaPlace:
    """A rank of the replica, with all that determines which rows it receives and sends."""

    rank: int
    """Rank within the replica: tp + tensor * (cp + context * pp)."""
    num_ranks: int
    """Number of ranks of the replica."""
    tensor: int
    """Size of tp."""
    context: int
    """Size of cp."""
    tp_shards: int
    """Number of shards into which tp divides a sequence: 1 without sequence parallelism."""
    tp: int
    cp: int
    pp: int
    shards: tuple[SequenceShards, ...]
    """How the ranks of a stage share the sequences of each micro-batch."""
    inline: bool
    """Whether the encoder runs where its rows are added, so that no row is sent to another rank."""
    returns: bool
    """Whether this rank returns the gradients of the rows that it received."""


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
    """Number of positions that are left after truncation."""
    first_unit: int
    """Number of its first unit among all units of the replica, which are numbered rank by rank."""
    first_row: int
    """Number of the first row of that unit among the rows that the replica's ranks make."""
    plan: ImagePlan

    @property
    def stop_unit(self) -> int:
        """One past the number of its last unit."""
        return self.first_unit + len(self.plan.units)


def overlapping(images: Sequence[StepImage], mine: range) -> list[StepImage]:
    """Select the images that have a unit in a range.

    Args:
        images: Images of the step, in order.
        mine: Numbers of units.

    Returns:
        The images with at least one of these units, in order.
    """
    return [image for image in images if image.first_unit < mine.stop and mine.start < image.stop_unit]


def blocks(images: Sequence[StepImage], slots: Sequence[int]) -> Iterator[tuple[StepImage, SlotRows]]:
    """List the rows of images by slot.

    Args:
        images: Images of the step, in order.
        slots: Slots in the order in which their rows are exchanged.

    Yields:
        An image and its rows for one slot, in the order of the exchange: by micro-batch, slot, sample and image.
    """
    for _, group in groupby(images, key=lambda image: image.micro_batch):
        together = [(image, {rows.slot: rows for rows in image.plan.slots}) for image in group]
        for slot in slots:
            for image, by_slot in together:
                if slot in by_slot:
                    yield image, by_slot[slot]


@dataclass(frozen=True, slots=True)
class Received:
    """The rows that a rank receives from all ranks, in the order of the exchange."""

    position: Index
    """Position `s * B + b` in the rank's shard, for each row."""
    source: npt.NDArray[np.uint16]
    """Replica rank that makes the row, for each row."""
    row: Index
    """Number of the row, counted from the replica's first unit, or NEWLINE_ROW; empty unless the encoder is inline."""
    counts: dict[tuple[int, int], int]
    """Number of rows by (micro-batch, slot), in the order of the exchange."""
    blanks: dict[int, Index]
    """By micro-batch, positions of images that have no base rows: rows of zeros take the embedding's place there."""


def _blanks(place: ReplicaPlace, images: Sequence[StepImage]) -> dict[int, Index]:
    """List by micro-batch the positions of images in a rank's shard; micro-batches without any are left out."""
    found: dict[int, list[Index]] = {}
    stretches = [shards.stretches(place.cp, place.tp) for shards in place.shards]
    for image in images:
        cells = np.arange(image.length, dtype=np.int32)
        _, local = _own_cells(image, SlotRows(EMBEDDING, cells, cells, cells), stretches[image.micro_batch])
        if len(local):
            found.setdefault(image.micro_batch, []).append(local * image.batch_size + image.sample)
    return {m: np.concatenate(parts) for m, parts in found.items()}


def receive(
    place: ReplicaPlace, images: Sequence[StepImage], slots: Sequence[int], bounds: Index, *, has_base_rows: bool = True
) -> Received:
    """List the rows that one rank receives.

    Args:
        place: The rank.
        images: All images of the step.
        slots: The slots of the rank's stage, by virtual stage.
        bounds: int64 (ranks + 1,): the first unit of each rank, and at the end the number of all units.
        has_base_rows: Whether images have rows for EMBEDDING; if not, zeros take the embedding's place.

    Returns:
        The rows, in the order of `blocks`.
    """
    stretches = {one: one.stretches(place.cp, place.tp) for one in set(place.shards)}
    positions, sources, rows = [np.empty(0, np.int64)], [np.empty(0, np.uint16)], [np.empty(0, np.int64)]
    counts: dict[tuple[int, int], int] = {}
    for image, block in blocks(images, slots):
        kept, local = _own_cells(image, block, stretches[place.shards[image.micro_batch]])
        if not len(local):
            continue
        positions.append(local * image.batch_size + image.sample)
        if place.inline:
            sources.append(np.full(len(local), place.rank, np.uint16))
            rows.append(_replica_rows(image, block.row[kept]))
        else:
            sources.append(_sources(image, block.unit[kept], bounds))
        key = image.micro_batch, block.slot
        counts[key] = counts.get(key, 0) + len(local)
    blanks = {} if has_base_rows or EMBEDDING not in slots else _blanks(place, images)
    return Received(np.concatenate(positions), np.concatenate(sources), np.concatenate(rows), counts, blanks)


def _own_cells(image: StepImage, block: SlotRows, stretches: Sequence[Stretch]) -> tuple[Kept, Index]:
    """Select the rows of a block that lie in this rank's shard, and return their positions there."""
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
    """Return the rank that makes each row, given its unit; the units of rank k begin at `bounds[k]`."""
    owners = np.searchsorted(bounds, np.arange(image.first_unit, image.stop_unit), side="right") - 1
    if owners[0] == owners[-1]:
        return np.full(len(unit), owners[0], np.uint16)
    found: npt.NDArray[np.uint16] = owners.astype(np.uint16)[unit]
    return found


def _replica_rows(image: StepImage, row: npt.NDArray[np.int32]) -> Index:
    """Count rows from the replica's first unit instead of the image's; NEWLINE_ROW is not changed."""
    return np.where(row == NEWLINE_ROW, NEWLINE_ROW, row + np.int64(image.first_row))


@dataclass(frozen=True, slots=True)
class Sent:
    """The rows that a rank sends. Rows are counted from the replica's first unit."""

    rows: Index
    """Rows to send, by destination."""
    splits: tuple[int, ...]
    """Number of rows sent to each rank."""
    returned: Index
    """Rows whose gradients come back, by the rank that returns them."""
    returned_splits: tuple[int, ...]
    """Number of gradients that come back from each rank."""


def send(
    place: ReplicaPlace, images: Sequence[StepImage], slots_of_stage: Sequence[Sequence[int]], mine: range
) -> Sent:
    """List the rows that one rank sends, and those whose gradients come back.

    Args:
        place: The rank.
        images: All images of the step.
        slots_of_stage: The slots of each stage, by virtual stage.
        mine: Numbers of the units that the rank encodes.

    Returns:
        The rows by destination. Rows for one destination are in the order of `blocks`.
    """
    own = overlapping(images, mine)
    copies = place.tensor // place.tp_shards
    num_shards = place.context * place.tp_shards
    rows_of, returned, splits, returned_splits = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [], []
    for slots in slots_of_stage:
        rows, shards = [np.empty(0, np.int64)], [np.empty(0, np.uint16)]
        for image, block in blocks(own, slots):
            kept = _of_units(image, block, mine)
            rows.append(_replica_rows(image, block.row[kept]))
            if num_shards > 1:
                here = place.shards[image.micro_batch]
                shards.append(here.shard_of(block.cell[kept] + np.int64(image.start)).astype(np.uint16))
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
    """List the rows that a rank sends to itself if the encoder runs inline.

    Args:
        place: The rank.
        rows: All rows that it receives, counted from the replica's first unit.

    Returns:
        The same rows with this rank as their only destination.
    """
    splits = tuple(len(rows) if rank == place.rank else 0 for rank in range(place.num_ranks))
    if place.returns:
        return Sent(rows, splits, rows, splits)
    return Sent(rows, splits, rows[:0], (0,) * place.num_ranks)


def _of_units(image: StepImage, block: SlotRows, mine: range) -> Kept:
    """Select the rows of a block that the units of this rank make."""
    if mine.start <= image.first_unit and image.stop_unit <= mine.stop:
        return _EVERYTHING
    return (block.unit >= mine.start - image.first_unit) & (block.unit < mine.stop - image.first_unit)


def _order(keys: npt.NDArray[np.uint16]) -> Index:
    """Return the stable order by key. For 16-bit numbers NumPy uses a radix sort, which takes linear time."""
    if not len(keys) or keys.min() == keys.max():
        return np.arange(len(keys))
    return np.argsort(keys, kind="stable")


def local_rows(rows: Index, first_row: int, num_local: int) -> Index:
    """Turn rows of the replica into rows of a rank's table, whose last row is the newline.

    Args:
        rows: Rows counted from the replica's first unit, or NEWLINE_ROW.
        first_row: The rank's first row in this count.
        num_local: Number of rows of the rank's table, including the newline.

    Returns:
        int64, as many as `rows`.
    """
    local = np.where(rows == NEWLINE_ROW, num_local - 1, rows - first_row)
    assert not len(local) or 0 <= local.min() <= local.max() < num_local, "a route names a row its rank does not make"
    return local


def count_by_rank(ranks: npt.NDArray[np.uint16], num_ranks: int) -> tuple[int, ...]:
    """Count how often each rank occurs.

    Args:
        ranks: Replica ranks, one for each row.
        num_ranks: Number of ranks of the replica.

    Returns:
        The count of each rank.
    """
    return tuple(np.bincount(ranks, minlength=num_ranks).tolist())


@dataclass(frozen=True, slots=True)
class ArrangedRows:
    """The received rows of a rank, arranged as its chunks add them."""

    rows: Index
    """See `RankRoutes.stored_rows`."""
    chunks: dict[tuple[int, int], ChunkRows]
    """The rows of each (micro-batch, virtual stage)."""


def arrange(received: Received, chunks: Sequence[Chunk], slots: Sequence[int]) -> ArrangedRows:
    """Arrange the rows of each chunk and micro-batch as the chunk adds them.

    Args:
        received: The rows that the rank receives.
        chunks: The chunks of the rank's stage, by virtual stage.
        slots: The slots of the decoder's stacks.

    Returns:
        The arranged rows, with each received row once.
    """
    order = _order(received.source)
    arrival = np.empty_like(order)
    arrival[order] = np.arange(len(order))
    sizes = _stretch_sizes(received, chunks, slots)
    num_stored = sum(base + len(stacked) * max(stacked, default=0) for base, stacked in sizes.values())
    rows, positions = np.full(num_stored, len(order)), np.zeros(num_stored, np.int64)
    found, first, taken = {}, 0, 0
    for key, (base, stacked) in sizes.items():
        longest = max(stacked, default=0)
        stop = first + base + len(stacked) * longest
        begin = first
        blank = received.blanks.get(key[0], _NO_ROWS) if base else _NO_ROWS
        positions[first + base - len(blank) : first + base] = blank
        for size, room in ((base - len(blank), base), *((size, longest) for size in stacked)):
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
    return ArrangedRows(rows, found)


def _stretch_sizes(
    received: Received, chunks: Sequence[Chunk], slots: Sequence[int]
) -> dict[tuple[int, int], tuple[int, list[int]]]:
    """Count by (micro-batch, virtual stage) the base rows and the rows of each slot; leave out those without rows."""
    counts, found = received.counts, {}
    for m in sorted({m for m, _ in counts} | set(received.blanks)):
        for chunk in chunks:
            base = counts.get((m, EMBEDDING), 0) + len(received.blanks.get(m, ())) if chunk.has_embedding else 0
            stacked = [counts.get((m, slot), 0) for slot in chunk_slots(chunk, slots)]
            if base + sum(stacked):
                found[m, chunk.vpp] = base, stacked
    return found
