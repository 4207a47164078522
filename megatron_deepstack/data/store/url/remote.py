"""Stores in an object store: small index arrays are copied once, views are fetched as byte ranges into a bounded cache.

Each view is fetched and kept by itself, neighbours in one request. Training reads images in random order: if the cache
is smaller than the store, whole shards (64 images) would have to be fetched again for nearly every image. Requests of
one call run in parallel. Nothing stays open after the call, so the reader is safe in threads and after a fork, and can
be pickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.attributes import parse_attributes
from megatron_deepstack.data.store.index import chunk_bytes, parse_metadata
from megatron_deepstack.data.store.schema import (
    EMPTY_CHUNK,
    INDEX_ARRAYS,
    METADATA_FILE,
    PIXELS,
    SlotsShape,
    index_chunk_path,
    index_chunk_rows,
    index_names,
    shard_index_bytes,
)
from megatron_deepstack.data.store.shards import ShardError, extents_of, parse_index, runs, unpack, used_part
from megatron_deepstack.data.store.url.cache import BoundedFolder, last_use_of_held, remove_held
from megatron_deepstack.data.store.url.remote_array import BY_BLOCKS, side_by_side
from megatron_deepstack.errors import StoreError
from megatron_deepstack.platform.files.rename import sync

_MOST_BYTES: Final = 8 << 20
"""Bytes asked for in one request, unless a single view is larger."""
_MOST_INDICES: Final = 1024
"""Shard indices kept in memory: 5 KB each for DeepStack-L, 26 KB for DeepStack-HD."""


def copy_index(location: Location, document: bytes, cache: BoundedFolder) -> Path:
    """Copy metadata and small index arrays of a store into the cache, unless they are there.

    Of large arrays (`remote_array.BY_BLOCKS`) only the sizes are checked: `RemoteArray` reads them.

    Args:
        location: The store.
        document: The store's own zarr.json as it is now. A store that was written again gets a new copy, and the older
            copies are removed.
        cache: Where the copy is kept; it counts towards the limit, and may be removed after an hour without use.

    Returns:
        The copy's folder. Its name identifies this store in its present state.

    Raises:
        StoreError: An object is missing or of a wrong size, or the copy cannot be written or is larger than the limit.
    """
    source = hashlib.sha256(f"{location}".encode()).hexdigest()[:16]
    folder = cache.held / f"{source}-{hashlib.sha256(document).hexdigest()[:16]}"
    with cache.writing(), _locked(folder):
        done = folder / ".complete"
        if not done.exists():
            names = index_names(parse_attributes(location, document).version)
            arrays = [f"{array}/{METADATA_FILE}" for array in (PIXELS, *names)]
            side_by_side(partial(_copy, location, folder), arrays)
            chunks = _chunks(location, folder, names)
            side_by_side(partial(_check_size, location), [chunk for chunk in chunks if chunk.name in BY_BLOCKS])
            small = [chunk for chunk in chunks if chunk.name not in BY_BLOCKS]
            cache.reserve_held(sum(chunk.size for chunk in small), f"the index of {location}")
            side_by_side(partial(_copy, location, folder), [chunk.path for chunk in small])
            (folder / METADATA_FILE).write_bytes(document)
            _sync(folder)
            done.touch()
            for other in cache.held.glob(f"{source}-*"):
                if other != folder:
                    remove_held(other, last_use_of_held(other))
        os.utime(done)
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder of copies, which is made if missing; until then another process may remove it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(folder / ".lock", "ab")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            continue
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(lock.fileno(), folder / ".lock"):
                yield
                return


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that `path` names now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sync(folder: Path) -> None:
    """Make sure that everything below a folder is on disk, including the names of its files."""
    for path in (folder, *folder.rglob("*")):
        sync(path)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk file of an index array."""

    name: str
    path: str
    size: int


def _chunks(location: Location, folder: Path, names: Sequence[str]) -> list[_Chunk]:
    chunks = []
    for name in names:
        array = INDEX_ARRAYS[name]
        metadata = f"{name}/{METADATA_FILE}"
        shape = parse_metadata(str(location.child(metadata)), (folder / metadata).read_bytes()).get("shape")
        rows = shape[0] if isinstance(shape, list) and shape and isinstance(shape[0], int) else 0
        size = chunk_bytes(name, rows)
        chunks += [_Chunk(name, index_chunk_path(array, k), size) for k in range(-(-rows // index_chunk_rows(rows)))]
    return chunks


def _check_size(location: Location, chunk: _Chunk) -> None:
    source = location.child(chunk.path)
    try:
        found = source.size()
    except FileNotFoundError as error:
        raise StoreError(f"{source}: cannot be read: no such object. The store is damaged.") from error
    except OSError as error:
        raise StoreError(f"{source}: cannot be read: {error.strerror or error}.") from error
    if found != chunk.size:
        raise StoreError(f"{source}: has {found} bytes, expected {chunk.size}. The store is damaged: preprocess again.")


def _copy(location: Location, folder: Path, name: str) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as file:
        for block in _blocks(location.child(name)):
            file.write(block)


def _blocks(source: Location) -> Iterator[bytes]:
    """The bytes of an object, block by block. Raises StoreError if the object, not the copy, has a fault."""
    try:
        with source.open_read() as file:
            while block := file.read(1 << 22):
                yield block
    except FileNotFoundError as error:
        raise StoreError(f"{source}: cannot be read: no such object. The store is damaged.") from error
    except OSError as error:
        raise StoreError(f"{source}: cannot be read: {error.strerror or error}.") from error


@dataclass(frozen=True, slots=True)
class _Fetch:
    """Views that follow each other in a shard: one request."""

    part: int
    offset: int
    sizes: tuple[int, ...]
    slots: tuple[int, ...]
    places: tuple[int, ...]
    """Rows of the output."""


class RemoteShards:
    """Shards at a URL, through a cache of views."""

    def __init__(self, location: Location, name: str, pixels: SlotsShape, cache: BoundedFolder) -> None:
        """Prepare to read; nothing is fetched. `name` distinguishes this store's copies from those of others."""
        self._location, self._name, self._pixels, self._cache = location, name, pixels, cache
        self._in_use = cache.held / name / ".complete"
        self._indices: dict[int, np.ndarray] = {}

    def where(self, slot: int) -> str:
        """URL of the shard that holds a slot."""
        return str(self._location.child(self._pixels.shard_path(slot // self._pixels.slots_per_part)))

    def forget(self, slots: Sequence[int]) -> bool:
        """Delete the copies of these views, so that they are fetched again; always True."""
        for slot in slots:
            self._cache.drop(self._copy_name(slot))
        return True

    def read(self, slots: Sequence[int], out: np.ndarray) -> None:
        """Read views into the rows of `out`: copies first, then everything missing, in few parallel requests.

        Args:
            slots: Rows of `images/pixels`, in any order.
            out: uint8 (len(slots), S, S, 3).

        Raises:
            ShardError: An object is missing or damaged.
            LocationError: The connection fails.
        """
        with suppress(FileNotFoundError):
            os.utime(self._in_use)  # so that the copy of the store's index is not removed
        indices = self._load_indices(sorted({slot // self._pixels.slots_per_part for slot in slots}))
        missing = []
        for first, places in runs(slots, self._pixels.slots_per_part):
            index = indices[first // self._pixels.slots_per_part]
            missing += list(self._read_copies(index, first, places, out))
        if missing:
            side_by_side(partial(self._fetch, out), missing)

    def _read_copies(self, index: np.ndarray, first: int, places: Sequence[int], out: np.ndarray) -> Iterator[_Fetch]:
        """Fill rows from copies; yields the requests for all others."""
        part, slot = divmod(first, self._pixels.slots_per_part)
        extents = extents_of(index, slot, len(places))
        waiting: list[tuple[int, int, int, int]] = []
        for number, (place, (offset, size)) in enumerate(zip(places, extents, strict=True), start=first):
            if offset == EMPTY_CHUNK or (self._pixels.compression is Compression.NONE and size != out[place].nbytes):
                raise ShardError(f"{self.where(number)}: row {number} was never written.", number)
            if self._read_copy(number, size, out[place]):
                continue
            follows = waiting and offset == waiting[-1][0] + waiting[-1][1]
            if waiting and (not follows or offset + size - waiting[0][0] > _MOST_BYTES):
                yield _fetch_of(part, waiting)
                waiting = []
            waiting.append((offset, size, number, place))
        if waiting:
            yield _fetch_of(part, waiting)

    def _read_copy(self, slot: int, size: int, out: np.ndarray) -> bool:
        if self._pixels.compression is Compression.NONE:
            return self._cache.read_into(self._copy_name(slot), out.reshape(-1).data)
        packed = memoryview(bytearray(size))
        if not self._cache.read_into(self._copy_name(slot), packed):
            return False
        try:
            unpack(packed, out, str(self._cache.root), slot)
        except ShardError:
            return False  # a damaged copy: the view is fetched again
        return True

    def _fetch(self, out: np.ndarray, fetch: _Fetch) -> None:
        data = memoryview(self._read_object(fetch.part, fetch.offset, sum(fetch.sizes), fetch.slots[0]))
        begin = 0
        for slot, place, size in zip(fetch.slots, fetch.places, fetch.sizes, strict=True):
            view = data[begin : begin + size]
            begin += size
            if self._pixels.compression is Compression.NONE:
                out[place].reshape(-1)[:] = view
            else:
                unpack(view, out[place], self.where(slot), slot)
            self._cache.keep(self._copy_name(slot), view)

    def _load_indices(self, parts: Sequence[int]) -> dict[int, np.ndarray]:
        """The indices of at least these parts. Another thread may replace the cached ones, so use the result."""
        known = self._indices
        missing = [part for part in parts if part not in known]
        if not missing:
            return known
        found = side_by_side(self._index, missing)
        if len(known) + len(missing) > _MOST_INDICES:
            known = {part: known[part] for part in parts if part in known}
        self._indices = loaded = {**known, **dict(zip(missing, found, strict=True))}
        return loaded

    def _index(self, part: int) -> np.ndarray:
        """A shard's index, from its copy or from the shard's end."""
        length = shard_index_bytes(self._pixels)
        raw, name = bytearray(length), f"{self._name}/{part}/index"
        if self._cache.read_into(name, memoryview(raw)):
            index = parse_index(bytes(raw))
            if index is not None:
                return used_part(index)
        slot = part * self._pixels.slots_per_part
        try:
            size = self._location.child(self._pixels.shard_path(part)).size()
        except OSError as error:
            raise self._missing(slot, error) from error
        index, fetched = None, b""
        if size >= length:
            fetched = self._read_object(part, size - length, length, slot)
            index = parse_index(fetched)
        if index is None:
            raise ShardError(f"{self.where(slot)}: the shard's index is damaged or cut off.", slot)
        self._cache.keep(name, fetched)
        return used_part(index)

    def _read_object(self, part: int, first: int, length: int, slot: int) -> bytes:
        try:
            data = self._location.child(self._pixels.shard_path(part)).read_bytes(first, length)
        except OSError as error:
            raise self._missing(slot, error) from error
        if len(data) != length:
            raise ShardError(f"{self.where(slot)}: the shard ends before byte {first + length}.", slot)
        return data

    def _missing(self, slot: int, error: OSError) -> ShardError:
        return ShardError(f"{self.where(slot)}: the shard cannot be read: {error.strerror or error}.", slot)

    def _copy_name(self, slot: int) -> str:
        part, number = divmod(slot, self._pixels.slots_per_part)
        return f"{self._name}/{part}/{number}"


def _fetch_of(part: int, waiting: Sequence[tuple[int, int, int, int]]) -> _Fetch:
    offsets, sizes, slots, places = zip(*waiting, strict=True)
    return _Fetch(part=part, offset=offsets[0], sizes=sizes, slots=slots, places=places)
