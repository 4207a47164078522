"""Reading slots directly from shards: one `preadv` for neighbouring slots; indices and open files are cached.

A slot is a view, or, in stores of views of any size, a block of one.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import google_crc32c
import numpy as np

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.data.location import require_descriptors
from megatron_deepstack.data.store.codec import CodecError, decompress
from megatron_deepstack.data.store.schema import EMPTY_CHUNK, SlotsShape, shard_index_bytes

_OPEN_SHARDS: Final = 128
"""Shards that all stores of a process keep open. Their indices take at most 5 KB each for DeepStack-L, 26 KB for -HD,
and 16 KB for each 64 MiB of views of any size."""
_MOST_BUFFERS: Final = 1024
"""Buffers that one `preadv` may fill (IOV_MAX)."""


class ShardError(Exception):
    """A view that cannot be read; the message names the shard and ends with a full stop."""

    def __init__(self, message: str, slot: int) -> None:
        super().__init__(message)
        self.slot = slot
        """Row of `images/pixels`."""


class Shards(Protocol):
    """Where a store's pixels come from."""

    def read(self, slots: Sequence[int], out: np.ndarray) -> None:
        """Read slots, in whatever order they lie.

        Args:
            slots: Rows of `images/pixels`, in any order.
            out: uint8 (len(slots), *slot_shape) that receives them, in the order of `slots`.

        Raises:
            ShardError: A shard is missing or short, or a slot was never written. Checksums are not compared here.
        """

    def forget(self, slots: Sequence[int]) -> bool:
        """Delete copies of these slots, if any are kept; returns whether reading again may give other bytes."""

    def where(self, slot: int) -> str:
        """The shard that holds a slot, for messages."""


def runs(slots: Sequence[int], slots_per_part: int) -> Iterator[tuple[int, list[int]]]:
    """Group neighbouring slots.

    Args:
        slots: Rows of `images/pixels`, in any order.
        slots_per_part: Rows of one shard; no group crosses its end.

    Yields:
        The first slot of each group, and the places of the group's slots in `slots`.
    """
    order = sorted(range(len(slots)), key=slots.__getitem__)
    first = 0
    for last in range(1, len(order) + 1):
        if last < len(order):
            slot = slots[order[last]]
            if slot == slots[order[last - 1]] + 1 and slot % slots_per_part:
                continue
        yield slots[order[first]], order[first:last]
        first = last


def parse_index(raw: bytes) -> np.ndarray | None:
    """A shard's index from its bytes: uint64 (slots, 2) of offset and length; None if its checksum is wrong."""
    if google_crc32c.value(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        return None
    return np.frombuffer(raw[:-4], dtype="<u8").reshape(-1, 2)


def unpack(packed: memoryview, out: np.ndarray, where: str, slot: int) -> None:
    """Decompress a slot.

    Args:
        packed: Its bytes as they are in the shard.
        out: uint8 (*slot_shape) that receives it.
        where: The shard, for messages.
        slot: Row of `images/pixels`, for messages.

    Raises:
        ShardError: The bytes cannot be decompressed to a slot of that size.
    """
    try:
        decompress(packed, out)
    except CodecError as error:
        raise ShardError(f"{where}: the compressed view in row {slot} is damaged: {error}.", slot) from error


def used_part(index: np.ndarray) -> np.ndarray:
    """Return a shard's index without the slots after the last one that was written; a shard may have space for more."""
    written = np.flatnonzero(index[:, 0] != EMPTY_CHUNK)
    return index[: int(written[-1]) + 1 if len(written) else 0].copy()


def extents_of(index: np.ndarray, first: int, count: int) -> list[list[int]]:
    """Return offset and length of slots.

    Args:
        index: What `used_part` returned.
        first: The first slot of the shard.
        count: Number of slots.

    Returns:
        One pair for each slot; the offset is EMPTY_CHUNK for one that was never written.
    """
    found: list[list[int]] = index[first : first + count].tolist()
    return found + [[EMPTY_CHUNK, EMPTY_CHUNK]] * (count - len(found))


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _OpenShard:
    """An open shard; its file is closed when the last user has released it."""

    file: BinaryIO
    index: np.ndarray
    """As `used_part` returns it."""

    def __post_init__(self) -> None:
        weakref.finalize(self, self.file.close).atexit = False  # at exit a thread may still read


class _Uses:
    """Which open shards were used last, over all readers of this process, so that they share one limit.

    The shards themselves belong to their readers, and are closed together with them.
    """

    def __init__(self) -> None:
        self._readers: OrderedDict[tuple[int, int], weakref.ref[LocalShards]] = OrderedDict()
        self.unlock()
        os.register_at_fork(after_in_child=self.unlock)

    def unlock(self) -> None:
        """Take a new lock: in a forked child the old one may be held by a thread that the child does not have."""
        self.lock = threading.Lock()

    def add(self, reader: LocalShards, part: int) -> None:
        """Note that a reader uses a shard, and close the one that was unused for longest. Call with the lock held."""
        key = (id(reader), part)
        self._readers[key] = weakref.ref(reader)
        self._readers.move_to_end(key)
        while len(self._readers) > _OPEN_SHARDS:
            (_, oldest), found = self._readers.popitem(last=False)
            owner = found()
            if owner is not None:
                owner.opened.pop(oldest, None)


_USES: Final = _Uses()


class LocalShards:
    """Shards in a folder, the most recently used ones open. Safe in threads, and after a fork."""

    def __init__(self, root: Path, pixels: SlotsShape) -> None:
        self._root = root
        self._pixels = pixels
        self.opened: dict[int, _OpenShard] = {}
        """Open shards by part. Access them only while holding the lock of all readers."""

    def where(self, slot: int) -> str:
        """Path of the shard that holds a slot."""
        return str(self._root / self._pixels.shard_path(slot // self._pixels.slots_per_part))

    def forget(self, slots: Sequence[int]) -> bool:
        """Always False: nothing is copied, so reading again gives the same bytes."""
        return False

    def read(self, slots: Sequence[int], out: np.ndarray) -> None:
        """Read slots; neighbours are read in one call, whatever their order in `slots`.

        Args:
            slots: Rows of `images/pixels`, in any order.
            out: uint8 (len(slots), *slot_shape) that receives them, in the order of `slots`.

        Raises:
            ShardError: A shard is missing or short, or a slot was never written.
        """
        for first, places in runs(slots, self._pixels.slots_per_part):
            part, slot = divmod(first, self._pixels.slots_per_part)
            shard = self._shard(part, first)
            extents = extents_of(shard.index, slot, len(places))
            if self._pixels.compression is Compression.NONE:
                self._read_raw(shard.file.fileno(), first, extents, places, out)
            else:
                self._read_packed(shard.file.fileno(), first, extents, places, out)

    def chunks(self, slots: Sequence[int]) -> Iterator[memoryview]:
        """Slots as they are stored in the shards, compressed or not. Raises ShardError."""
        for first, places in runs(slots, self._pixels.slots_per_part):
            part, slot = divmod(first, self._pixels.slots_per_part)
            shard = self._shard(part, first)
            for k, (offset, size) in enumerate(extents_of(shard.index, slot, len(places)), start=first):
                if offset == EMPTY_CHUNK:
                    raise self._error(k, f"slot {self._slot(k)} was never written.")
                chunk = memoryview(bytearray(size))
                self._fill(shard.file.fileno(), [chunk], offset, k)
                yield chunk

    def _read_raw(self, file: int, first: int, extents: list[list[int]], places: list[int], out: np.ndarray) -> None:
        """Read uncompressed slots directly into their rows; those that follow each other in the file share one call."""
        slot_bytes, begin = self._pixels.slot_bytes, 0
        for k, (offset, size) in enumerate(extents):
            if offset == EMPTY_CHUNK or size != slot_bytes:
                raise self._error(first + k, f"slot {self._slot(first + k)} was never written.")
            if k + 1 < len(extents) and extents[k + 1][0] == offset + slot_bytes and k + 1 - begin < _MOST_BUFFERS:
                continue
            self._fill(file, _rows(out, places[begin : k + 1]), extents[begin][0], first + begin)
            begin = k + 1

    def _read_packed(self, file: int, first: int, extents: list[list[int]], places: list[int], out: np.ndarray) -> None:
        for k, (offset, size) in enumerate(extents):
            if offset == EMPTY_CHUNK:
                raise self._error(first + k, f"slot {self._slot(first + k)} was never written.")
            packed = memoryview(bytearray(size))
            self._fill(file, [packed], offset, first + k)
            unpack(packed, out[places[k]], self.where(first + k), first + k)

    def _fill(self, file: int, buffers: list[memoryview], offset: int, slot: int) -> None:
        """Fill buffers from `offset` on; the system may return fewer bytes than asked for."""
        while buffers:
            try:
                count = os.preadv(file, buffers, offset)
            except OSError as error:
                raise self._error(slot, f"the shard cannot be read: {error.strerror or error}.") from error
            if count == 0:
                raise self._error(slot, f"the shard ends before byte {offset + sum(map(len, buffers))}.")
            offset += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if buffers:
                buffers[0] = buffers[0][count:]

    def _shard(self, part: int, slot: int) -> _OpenShard:
        """Open file and index of a shard.

        An evicted file is closed only when its last user has released it, so no thread reads through a descriptor that
        was given to another file. A forked child shares its parent's file: reads name their offset, so the two do not
        disturb each other.
        """
        with _USES.lock:
            shard = self.opened.get(part)
            if shard is not None:
                _USES.add(self, part)
                return shard
        found = self._open_shard(slot)
        with _USES.lock:
            shard = self.opened.setdefault(part, found)
            _USES.add(self, part)
            return shard

    def _open_shard(self, slot: int) -> _OpenShard:
        try:
            file = open(self.where(slot), "rb", buffering=0)  # noqa: SIM115 - stays open in the cache
        except OSError as error:
            require_descriptors(self.where(slot), error)
            raise self._error(slot, f"the shard cannot be opened: {error.strerror or error}.") from error
        try:
            return _OpenShard(file, used_part(self._read_index(file.fileno(), slot)))
        except ShardError:
            file.close()
            raise

    def _read_index(self, file: int, slot: int) -> np.ndarray:
        length = shard_index_bytes(self._pixels)
        try:
            position = os.fstat(file).st_size - length
            raw = os.pread(file, length, position) if position >= 0 else b""
        except OSError as error:
            raise self._error(slot, f"the shard cannot be read: {error.strerror or error}.") from error
        index = parse_index(raw) if len(raw) == length else None
        if index is None:
            raise self._error(slot, "the shard's index is damaged or cut off.")
        return index

    def _slot(self, slot: int) -> int:
        return slot % self._pixels.slots_per_part

    def _error(self, slot: int, what: str) -> ShardError:
        return ShardError(f"{self.where(slot)}: {what}", slot)


def _rows(out: np.ndarray, places: list[int]) -> list[memoryview]:
    """The bytes of rows of `out`, as one buffer if the rows follow each other."""
    first, last = places[0], places[-1]
    if last - first + 1 == len(places) and places == list(range(first, last + 1)):
        return [out[first : last + 1].reshape(-1).data]
    return [out[place].reshape(-1).data for place in places]
