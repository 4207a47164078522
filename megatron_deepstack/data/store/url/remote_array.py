"""Large index arrays of a store at a URL, read block by block through the bounded cache.

Tokens alone are gigabytes, and a rank reads a few kilobytes of them in a step. So only blocks that hold what is asked
for are fetched, and the cache removes them like any other copy. Several processes of a node ask for the same samples at
the same time, so one of them fetches each block, and the others find it in the cache. A copy carries a checksum,
because after a node's crash a file may exist without its bytes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import google_crc32c
import numpy as np

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.index import checked_rows
from megatron_deepstack.data.store.schema import INDEX_ARRAYS, index_chunk_path, index_chunk_rows
from megatron_deepstack.data.store.url.cache import BoundedFolder
from megatron_deepstack.errors import StoreError

BY_BLOCKS: Final = (
    "samples/tokens",
    "samples/loss_mask",
    "samples/id",
    "images/path",
    "images/sha256",
    "images/crc32c",
)
"""Arrays read in blocks; all others of a store at a URL are copied as a whole, about 60 bytes for each sample."""
_BLOCK_BYTES: Final = 256 << 10
"""Size of one block: about 160 samples of 400 tokens."""
_REQUESTS: Final = 16
"""Requests at a time."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def side_by_side(do: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Run requests in parallel threads.

    Args:
        do: What is done with each item.
        items: The items.

    Returns:
        The results in order. If some fail, the first error is raised after all others have ended.
    """
    with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="store-requests") as pool:
        return list(pool.map(do, items))


class RemoteArray:
    """One index array at a URL. Safe in threads, and after a fork."""

    def __init__(self, location: Location, folder: Path, name: str, cache: BoundedFolder) -> None:
        """Prepare to read; nothing is fetched.

        Args:
            location: The store.
            folder: Where its metadata is copied; its name distinguishes this store's blocks from those of others.
            name: The array, one of `schema.INDEX_ARRAYS`.
            cache: Where blocks are kept.

        Raises:
            StoreError: The metadata is not what this version writes.
        """
        self._location, self._cache, self._copies = location, cache, f"{folder.name}/{name}"
        self._array = INDEX_ARRAYS[name]
        self._rows = checked_rows(folder, name)
        self._row_bytes = int(np.prod(self._array.row_shape, dtype=np.int64)) * np.dtype(self._array.dtype).itemsize
        self._block_rows = _BLOCK_BYTES // self._row_bytes
        assert index_chunk_rows(self._rows) in (1, self._rows) or not index_chunk_rows(self._rows) % self._block_rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        """One row, or neighbouring rows, as a copy."""
        if not isinstance(rows, slice):
            row = operator.index(rows)
            row += self._rows if row < 0 else 0
            if not 0 <= row < self._rows:
                raise IndexError(f"row {rows} was asked for; there are {self._rows}")
            found: np.ndarray = self._read([row // self._block_rows])[0][row % self._block_rows]
            return found
        first, stop, _ = rows.indices(self._rows)
        if first >= stop:
            return np.empty((0, *self._array.row_shape), self._array.dtype)
        blocks = range(first // self._block_rows, (stop - 1) // self._block_rows + 1)
        begin = blocks[0] * self._block_rows
        pieces = self._read(blocks)
        together = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return together[first - begin : stop - begin]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows by their numbers, as a copy, in the given order. Raises IndexError."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} were asked for; there are {self._rows}")
        wanted, places = np.divmod(rows, self._block_rows)
        blocks = np.unique(wanted)
        out = np.empty((len(rows), *self._array.row_shape), self._array.dtype)
        for block, values in zip(blocks.tolist(), self._read(blocks.tolist()), strict=True):
            here = wanted == block
            out[here] = values[places[here]]
        return out

    def missing(self, first: np.ndarray, stop: np.ndarray) -> list[int]:
        """The blocks that are not in the cache and hold rows of these ranges.

        Args:
            first: int64 (N,), the first row of each range.
            stop: int64 (N,), the row after its last one.

        Returns:
            Numbers of blocks, ascending.
        """
        spans = zip((first // self._block_rows).tolist(), ((stop - 1) // self._block_rows).tolist(), strict=True)
        blocks = {block for begin, last in spans for block in range(begin, last + 1)}
        return [block for block in sorted(blocks) if not self._cache.has(self._copy_name(block))]

    def fetch(self, block: int) -> None:
        """Put a block into the cache, unless it is there already."""
        self._block(block)

    def _read(self, blocks: Sequence[int]) -> list[np.ndarray]:
        return [self._block(blocks[0])] if len(blocks) == 1 else side_by_side(self._block, blocks)

    def _block(self, block: int) -> np.ndarray:
        name = self._copy_name(block)
        found = self._read_copy(block, name)
        if found is None:
            with self._cache.one_at_a_time(name):
                found = self._read_copy(block, name)
                if found is None:
                    found = self._fetch(block)
                    self._cache.keep(name, found + google_crc32c.value(found).to_bytes(4, "little"))
        return np.frombuffer(found, self._array.dtype).reshape(-1, *self._array.row_shape)

    def _read_copy(self, block: int, name: str) -> bytes | None:
        """The block's bytes; None if there is no copy, or a damaged one."""
        size = self._bytes_of(block)
        copy = memoryview(bytearray(size + 4))
        if not self._cache.read_into(name, copy):
            return None
        data = bytes(copy[:size])
        return data if google_crc32c.value(data) == int.from_bytes(copy[size:], "little") else None

    def _fetch(self, block: int) -> bytes:
        chunk, row = divmod(block * self._block_rows, index_chunk_rows(self._rows))
        source, size = self._location.child(index_chunk_path(self._array, chunk)), self._bytes_of(block)
        try:
            data = source.read_bytes(row * self._row_bytes, size)
        except FileNotFoundError as error:
            raise StoreError(f"{source}: cannot be read: no such object. The store is damaged.") from error
        except OSError as error:
            raise StoreError(f"{source}: cannot be read: {error.strerror or error}.") from error
        if len(data) != size:
            raise StoreError(f"{source}: ends before byte {row * self._row_bytes + size}. The store is damaged.")
        return data

    def _bytes_of(self, block: int) -> int:
        return min(self._block_rows, self._rows - block * self._block_rows) * self._row_bytes

    def _copy_name(self, block: int) -> str:
        return f"{self._copies}/{block}"
