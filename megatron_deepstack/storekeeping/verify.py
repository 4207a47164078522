"""`store verify`: every rule of the index arrays, and every byte of every shard, in parallel over shards.

One run finds all faults, each with advice. A store at a URL is read in full from there, not from the copies that
training may have kept.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import pairwise
from multiprocessing import get_context

import google_crc32c
import numpy as np

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.data.location import Location, require_descriptors
from megatron_deepstack.data.store.codec import CodecError, decompress
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import EMPTY_CHUNK, PIXELS, VERSION, shard_index_bytes
from megatron_deepstack.data.store.shards import parse_index
from megatron_deepstack.data.store.url.cache import CacheConfig
from megatron_deepstack.storekeeping.damage import REMAKE, RESTORE, Damage, rows
from megatron_deepstack.storekeeping.verify_index import check_index

Progress = Callable[[int, int], None]
"""Called with the number of shards done, and of all."""


def verify(path: str, *, processes: int | None = None, progress: Progress = lambda done, total: None) -> list[Damage]:
    """Find every fault of a store.

    Args:
        path: Folder or URL of the store.
        processes: How many processes read shards at a time; all CPUs if None.
        progress: Called with the number of shards done, and of all.

    Returns:
        The faults in the order of the store's files; empty if it is whole.

    Raises:
        StoreError: There is no finished store, or an index array is missing or of the wrong length.
        LocationError: A URL cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="deepstack-verify-") as folder:
        cache = CacheConfig(folder)
        store = Store.open(path, cache=cache)
        found = check_index(store)
        found += _strange_shards(store)
        parts = images_by_part(store)
        by_part: dict[int, list[Damage]] = {}
        workers = min(processes or len(os.sched_getaffinity(0)), len(parts))
        for part, faults in _in_parallel(path, cache, workers, parts) if workers > 1 else _here(store, parts):
            by_part[part] = faults
            progress(len(by_part), len(parts))
        return found + [damage for part in range(len(parts)) for damage in by_part[part]]


def images_by_part(store: Store) -> list[np.ndarray]:
    """For each part the images that have views there.

    Args:
        store: The store; its starts may be damaged.

    Returns:
        One int64 array of ascending image numbers for each part.
    """
    images = np.flatnonzero(store.array("images/count") > 0)
    parts = store.array("images/start")[images] // store.pixels.slots_per_part
    order = np.argsort(parts, kind="stable")
    bounds = np.searchsorted(parts[order], np.arange(store.pixels.num_parts + 1)).tolist()
    images = images[order]
    return [images[first:last] for first, last in pairwise(bounds)]


def _here(store: Store, parts: Sequence[np.ndarray]) -> Iterator[tuple[int, list[Damage]]]:
    for part, images in enumerate(parts):
        yield part, list(shard_faults(store, part, images))


def _in_parallel(
    path: str, cache: CacheConfig, workers: int, parts: Sequence[np.ndarray]
) -> Iterator[tuple[int, list[Damage]]]:
    """The same in several processes; parts come in the order in which they are done."""
    with ProcessPoolExecutor(workers, get_context("spawn"), _open_in_worker, (path, cache)) as pool:
        waiting = {pool.submit(_in_worker, part, images): part for part, images in enumerate(parts)}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


_store: Store | None = None
"""The store that a worker process reads."""


def _open_in_worker(path: str, cache: CacheConfig) -> None:
    global _store
    _store = Store.open(path, cache=cache)


def _in_worker(part: int, images: np.ndarray) -> list[Damage]:
    assert _store is not None
    return list(shard_faults(_store, part, images))


def shard_faults(store: Store, part: int, images: np.ndarray) -> Iterator[Damage]:
    """Find every fault of one shard: its length, its index, and the checksum of each view.

    Args:
        store: The store.
        part: The shard's number.
        images: int64 (N,), the images whose views are in it.

    Yields:
        The faults.
    """
    name = store.pixels.shard_path(part)
    location = store.location.child(name)
    length = shard_index_bytes(store.pixels)
    try:
        size = location.size()
        raw = location.read_bytes(size - length, length) if size >= length else b""
    except OSError as error:
        require_descriptors(str(location), error)
        yield Damage(name, _unreadable(error), RESTORE)
        return
    index = parse_index(raw) if len(raw) == length else None
    if index is None:
        yield Damage(name, f"its index, the last {length} of {size} bytes, is damaged or cut off", RESTORE)
        return
    owners = slot_owners(store, part, images)
    yield from _extent_faults(name, index, owners, size - length)
    yield from _view_faults(store, part, index, owners)


def slot_owners(store: Store, part: int, images: np.ndarray) -> np.ndarray:
    """The image that each slot of a part belongs to.

    Args:
        store: The store.
        part: The part's number.
        images: int64 (N,), the images whose views are in it.

    Returns:
        int64 (slots,), -1 for a slot of no image.
    """
    slots = store.pixels.slots_per_part
    begins = store.rows("images/start").take(images) - part * slots
    ends = begins + store.rows("images/count").take(images)
    owners = np.full(slots, -1, np.int64)
    for image, first, last in zip(images.tolist(), begins.tolist(), ends.tolist(), strict=True):
        owners[first:last] = image
    return owners


def _extent_faults(name: str, index: np.ndarray, owners: np.ndarray, data_bytes: int) -> Iterator[Damage]:
    """Faults unless exactly the used slots are written, and their chunks fill the file without gap or overlap."""
    written = index[:, 0] != EMPTY_CHUNK
    for wrong, what in ((~written & (owners >= 0), "never written"), (written & (owners < 0), "of no image")):
        if wrong.any():
            yield Damage(name, f"{rows(np.flatnonzero(wrong), 'slot')}: {what}", RESTORE)
    offsets, sizes = index[written].T.tolist() if written.any() else ([], [])
    ends = [0, *(offset + size for offset, size in sorted(zip(offsets, sizes, strict=True)))]
    if sorted(offsets) != ends[:-1] or ends[-1] != data_bytes:
        yield Damage(name, f"its chunks do not fill the {data_bytes} bytes before its index one after another", RESTORE)


def _view_faults(store: Store, part: int, index: np.ndarray, owners: np.ndarray) -> Iterator[Damage]:
    name, first = store.pixels.shard_path(part), part * store.pixels.slots_per_part
    sums = store.rows("images/crc32c")[first : first + store.pixels.slots_per_part]
    location = store.location.child(name)
    try:
        opened = location.open_read()
    except OSError as error:
        require_descriptors(str(location), error)
        yield Damage(name, _unreadable(error), RESTORE)
        return
    with opened as file:
        for slot in np.flatnonzero((owners >= 0) & (index[:, 0] != EMPTY_CHUNK)).tolist():
            offset, size = index[slot].tolist()
            try:
                file.seek(offset)
                fault = _chunk_fault(store, file.read(size), size, int(sums[slot]))
            except OSError as error:
                fault = _unreadable(error)
            if fault is not None:
                yield Damage(name, f"{_view_name(store, first + slot, int(owners[slot]))} {fault}", RESTORE)


def _unreadable(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


def _view_name(store: Store, row: int, image: int) -> str:
    view = row - int(store.rows("images/start")[image])
    return f"{'view' if store.version == VERSION else 'block'} {view} of image {image} ({_path_of(store, image)!r})"


def _path_of(store: Store, image: int) -> str:
    """An image's path; bytes that are not UTF-8 are replaced."""
    first, last = store.rows("images/path_offsets")[image : image + 2].tolist()
    return store.rows("images/path")[first:last].tobytes().decode(errors="replace")


def _chunk_fault(store: Store, chunk: bytes, size: int, written: int) -> str | None:
    """What is wrong with a view's bytes; None if nothing is."""
    if len(chunk) != size:
        return f"is cut off after {len(chunk)} of {size} bytes"
    pixels: bytes | np.ndarray = chunk
    if store.pixels.compression is not Compression.NONE:
        pixels = np.empty(store.pixels.slot_bytes, np.uint8)
        try:
            decompress(memoryview(chunk), pixels)
        except CodecError as error:
            return f"is damaged: {error}"
    elif size != store.pixels.slot_bytes:
        return f"has {size} bytes, expected {store.pixels.slot_bytes}"
    found = google_crc32c.value(pixels)
    return None if found == written else f"is damaged: its crc32c is {found:08x}, {written:08x} was written"


def _strange_shards(store: Store) -> list[Damage]:
    """Files among the shards that belong to no part of the array."""
    known = {str(store.location.child(store.pixels.shard_path(part))) for part in range(store.pixels.num_parts)}
    shards: Location = store.location.child(f"{PIXELS}/c")
    strange = [
        found
        for found in map(str, shards.list("*" + "/0" * (len(store.pixels.slot_shape) - 1) + "/*"))
        if found not in known
    ]
    advice = f"delete it if nothing is being written to the store now, else {REMAKE}"
    return [Damage(found, "is no shard of this store", advice) for found in strange]
