"""Writing a new store from pieces of finished ones: whole shards if possible; views are never decoded.

A shard that is kept as a whole is hard-linked if the file system allows it, and copied otherwise; of other shards the
chunks are copied unchanged. The store is built under a hidden name beside its final name and renamed when it is
complete, so that it exists either as a whole or not at all; the next run removes what a killed run left. The bytes
depend only on the sources.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import VERSION, ImageStatus, SlotsShape, index_names
from megatron_deepstack.data.store.shard_writer import open_shard
from megatron_deepstack.data.store.shards import LocalShards, ShardError
from megatron_deepstack.data.store.writer import (
    IndexWriters,
    atomic_file,
    open_index,
    write_error,
    write_json,
    write_skeleton,
)
from megatron_deepstack.errors import StoreError
from megatron_deepstack.storekeeping.rewrite.regroup import NewPart, Regrouping, Source, regroup

Progress = Callable[[int, int], None]
"""Called with the number of shards done, and of all."""
_SAMPLES_AT_ONCE: Final = 1 << 16
"""Samples whose tokens are in memory at a time."""


def open_local(path: Path) -> Store:
    """A store to take from. Raises StoreError unless it is finished and in a local folder."""
    store = Store.open(path)
    if not store.location.is_local:
        raise StoreError(f"{path}: stores are merged and split in folders; copy it to one first")
    return store


@contextmanager
def building(root: Path) -> Iterator[Path]:
    """A folder to build the store `root` in; it gets that name when the block ends without an error.

    Args:
        root: Where the store will be.

    Yields:
        The folder to write to.

    Raises:
        StoreError: `root` exists, or another process is building it, or it cannot be written.
    """
    if root.exists():
        raise StoreError(f"{root}: exists already; give another folder, or delete this one if it is no longer needed")
    draft = root.with_name(f".{root.name}.partial")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        lock = open(root.with_name(f".{root.name}.lock"), "ab")  # noqa: SIM115 - closed below
    except OSError as error:
        raise write_error(root, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(f"{root}: another process is writing this store; wait for it") from error
        try:
            shutil.rmtree(draft, ignore_errors=True)
            yield draft
            os.rename(draft, root)
        except OSError as error:
            raise write_error(root, error) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)


def assemble(
    draft: Path,
    sources: Sequence[Source],
    description: dict[str, Any],
    quarantine: Iterable[bytes],
    *,
    dropped: int,
    progress: Progress,
) -> Regrouping:
    """Write a complete store of the sources' kept samples and images.

    Args:
        draft: Folder to write to, see `building`.
        sources: Stores with what is kept of each.
        description: How the new store was made; its hash is the store's plan hash.
        quarantine: Lines of quarantine.jsonl.
        dropped: Samples that were left out when the sources were made.
        progress: Called with the number of shards done, and of all.

    Returns:
        The new store's shards, and the new numbers of all images.

    Raises:
        StoreError: A source is damaged, or a file cannot be written.
    """
    first = sources[0].store
    slots = max(source.store.pixels.slots_per_part for source in sources)
    plan = regroup(sources, slots)
    shape = replace(first.pixels, num_parts=len(plan.parts), slots_per_part=slots)
    shards = [LocalShards(source.store.location.local_path(), source.store.pixels) for source in sources]
    for number, part in enumerate(plan.parts):
        try:
            _write_part(draft, number, part, sources, shards, shape)
        except ShardError as error:
            raise StoreError(f"{error} See what else is damaged with `store verify`.") from error
        progress(number + 1, len(plan.parts))
    with open_index(draft, shape.version) as index:
        counts = {**_write_images(index, plan, sources, slots), **_write_samples(index, plan, sources)}
    with atomic_file(draft / "quarantine.jsonl") as file:
        file.writelines(quarantine)
    plan_hash = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    write_json(draft / "plan.json", {"plan_hash": plan_hash, "description": description})
    attributes = {
        **asdict(first.attributes),
        "plan_hash": plan_hash,
        "counts": {name: {**counts, "dropped": dropped}[name] for name in _COUNTS},
        "complete": True,
    }
    write_skeleton(draft, shape, attributes)
    return plan


_COUNTS: Final = ("images", "flagged", "quarantined", "views", "samples", "dropped", "tokens", "target_tokens")


def _write_part(
    draft: Path,
    number: int,
    part: NewPart,
    sources: Sequence[Source],
    shards: Sequence[LocalShards],
    shape: SlotsShape,
) -> None:
    if part.whole is not None:
        source, old = part.whole
        store = sources[source].store
        if store.pixels.slots_per_part == shape.slots_per_part:
            _link(store.location.local_path() / shape.shard_path(old), draft / shape.shard_path(number))
            return
    with open_shard(draft, number, shape) as shard:
        for source, images in _by_source(part):
            starts, counts = (sources[source].store.rows(f"images/{name}").take(images) for name in ("start", "count"))
            for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
                for chunk in shards[source].chunks(range(start, start + count)):
                    shard.append_chunk(chunk)


def _by_source(part: NewPart) -> Iterator[tuple[int, np.ndarray]]:
    """Runs of a part's images that come from one source: the source's number, and the images' numbers."""
    for source, refs in groupby(part.images, key=itemgetter(0)):
        yield source, np.array([image for _, image in refs], np.int64)


def _link(source: Path, target: Path) -> None:
    """Give the same file a second name, or copy it if that is not possible."""
    if not source.is_file():
        raise StoreError(f"{source}: the shard is missing. See what else is damaged with `store verify`.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(target, error) from error
    try:
        os.link(source, target)
    except OSError:
        with atomic_file(target) as file:
            file.writelines(_blocks(source))


def _blocks(source: Path) -> Iterator[bytes]:
    """The bytes of a file, block by block. Raises StoreError if the file, not its copy, has a fault."""
    try:
        with open(source, "rb") as file:
            while block := file.read(1 << 24):
                yield block
    except OSError as error:
        raise read_error(source, error) from error


def read_error(path: Path, error: OSError) -> StoreError:
    """The error of a file of a source that cannot be read.

    Args:
        path: The file.
        error: What the system said.

    Returns:
        A StoreError, to be raised by the caller.
    """
    return StoreError(
        f"{path}: cannot be read: {error.strerror or error}. See what else is damaged with `store verify`."
    )


def _write_images(index: IndexWriters, plan: Regrouping, sources: Sequence[Source], slots: int) -> dict[str, int]:
    """Write the rows of all images; returns the counts."""
    paths = _Ragged(index, "images/path")
    found = {"images": 0, "flagged": 0, "quarantined": 0, "views": 0}
    for number, part in enumerate(plan.parts):
        taken_from = [(sources[source].store, images) for source, images in _by_source(part)]
        columns = {
            name: np.concatenate([store.rows(name).take(images) for store, images in taken_from])
            for name in _columns(sources[0].store.version)
        }
        ends = np.cumsum(columns["images/count"], dtype=np.int64)
        sums = np.zeros(slots, np.uint32)
        sums[: ends[-1]] = np.concatenate([_checksums(store, images) for store, images in taken_from])
        index.append("images/start", number * slots + np.concatenate([[0], ends[:-1]]))
        index.append("images/crc32c", sums)
        for name, rows in columns.items():
            index.append(name, rows)
        for store, images in taken_from:
            paths.take(store, images)
        found["images"] += len(part.images)
        found["flagged"] += int((columns["images/status"] == ImageStatus.FLAGGED).sum())
        found["quarantined"] += int((columns["images/status"] == ImageStatus.QUARANTINED).sum())
        found["views"] += int(ends[-1] if sources[0].store.version == VERSION else (columns["images/count"] > 0).sum())
    return found


def _columns(version: int) -> list[str]:
    """Arrays of one row per image that are copied as they are."""
    others = ("images/start", "images/path", "images/path_offsets", "images/crc32c")
    return [name for name in index_names(version) if name.startswith("images/") and name not in others]


def _checksums(store: Store, images: np.ndarray) -> np.ndarray:
    """The checksums of all views of these images, one after the other."""
    starts, counts = (store.rows(f"images/{name}").take(images).astype(np.int64) for name in ("start", "count"))
    return store.rows("images/crc32c").take(_stretches(starts, counts))


def _write_samples(index: IndexWriters, plan: Regrouping, sources: Sequence[Source]) -> dict[str, int]:
    """Write the rows of all samples, some at a time; returns the counts."""
    ids, tokens, images = (_Ragged(index, f"samples/{name}") for name in ("id", "tokens", "images"))
    num_targets = 0
    for source, numbers in zip(sources, plan.numbers, strict=True):
        for first in range(0, len(source.samples), _SAMPLES_AT_ONCE):
            samples = source.samples[first : first + _SAMPLES_AT_ONCE]
            ids.take(source.store, samples)
            tokens.take(source.store, samples)
            images.take(source.store, samples, numbers)
            masks, _ = taken(source.store, "samples/loss_mask", "samples/tokens_offsets", samples)
            index.append("samples/loss_mask", masks)
            num_targets += int(masks.sum())
    num_samples = sum(len(source.samples) for source in sources)
    return {"samples": num_samples, "tokens": tokens.end, "target_tokens": num_targets}


class _Ragged:
    """A flat array and its offsets, written from front to back."""

    def __init__(self, index: IndexWriters, name: str) -> None:
        self._index, self._name, self.end = index, name, 0
        index.append(f"{name}_offsets", [0])

    def take(self, store: Store, rows: np.ndarray, rename: np.ndarray | None = None) -> None:
        """Append rows of the same array of `store`; `rename` gives the new number of each value."""
        values, lengths = taken(store, self._name, f"{self._name}_offsets", rows)
        self._index.append(self._name, values if rename is None else rename[values])
        self._index.append(f"{self._name}_offsets", self.end + np.cumsum(lengths))
        self.end += len(values)


def taken(store: Store, name: str, offsets_name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read some rows of a ragged array.

    Args:
        store: The store.
        name: The flat array.
        offsets_name: Its array of offsets.
        rows: int64 (N,) numbers of rows.

    Returns:
        Their values one after the other, and their lengths (N,).
    """
    offsets = store.rows(offsets_name)
    begins = offsets.take(rows)
    lengths = offsets.take(rows + 1) - begins
    return store.rows(name).take(_stretches(begins, lengths)), lengths


def _stretches(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers begin, begin + 1, ... of each run, one run after the other."""
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    numbers: np.ndarray = np.repeat(begins, lengths) + within
    return numbers


def quarantine_lines(store: Store) -> list[bytes]:
    """The lines of a store's quarantine.jsonl; none if it has no such file. Raises StoreError if it cannot be read."""
    path = store.location.local_path() / "quarantine.jsonl"
    try:
        return path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    except OSError as error:
        raise read_error(path, error) from error
