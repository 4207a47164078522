"""Reading metadata documents and index arrays of a store.

Errors here only say what is wrong; the code that opens the store adds what to do about it.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.data.location import require_descriptors
from megatron_deepstack.data.store.schema import (
    INDEX_ARRAYS,
    METADATA_FILE,
    PIXELS,
    VERSION,
    BlockSlots,
    PixelsShape,
    SlotsShape,
    index_chunk_path,
    index_chunk_rows,
    index_metadata,
    pixels_metadata,
)
from megatron_deepstack.errors import StoreError


class ArrayReader(Protocol):
    """An index array of which some rows can be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: int | slice) -> np.ndarray: ...

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows by their numbers, as a copy, in the given order; quick if the numbers ascend. Raises IndexError."""


class IndexReader:
    """One index array, memory-mapped chunk by chunk; a slice within one chunk copies nothing."""

    def __init__(self, root: Path, name: str) -> None:
        array = INDEX_ARRAYS[name]
        self._rows = checked_rows(root, name)
        self._chunk_rows = index_chunk_rows(self._rows)
        chunk_shape = (self._chunk_rows, *array.row_shape)
        num_chunks = -(-self._rows // self._chunk_rows)
        self._chunks = [
            _map_chunk(root / index_chunk_path(array, k), array.dtype, chunk_shape) for k in range(num_chunks)
        ]
        self._empty = np.empty((0, *array.row_shape), dtype=array.dtype)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        if not isinstance(rows, slice):
            chunk, row = divmod(operator.index(rows), self._chunk_rows)
            return self._chunks[chunk][row]
        first, last, _ = rows.indices(self._rows)
        pieces = list(self._pieces(first, last))
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else self._empty

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows by their numbers, as a copy, in the given order; quick if the numbers ascend. Raises IndexError."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} were asked for; there are {self._rows}")
        chunks = rows // self._chunk_rows
        cuts = (np.flatnonzero(np.diff(chunks)) + 1).tolist()
        pieces = [self._empty]
        for first, last in pairwise((0, *cuts, len(rows))) if len(rows) else ():
            chunk = int(chunks[first])
            pieces.append(self._chunks[chunk][rows[first:last] - chunk * self._chunk_rows])
        return np.concatenate(pieces)

    def _pieces(self, first: int, last: int) -> Iterator[np.ndarray]:
        while first < last:
            chunk, row = divmod(first, self._chunk_rows)
            piece = self._chunks[chunk][row : row + last - first]
            yield piece
            first += len(piece)


def checked_rows(root: Path, name: str) -> int:
    """The number of rows of an index array.

    Args:
        root: Folder below which the metadata is.
        name: The array, one of `schema.INDEX_ARRAYS`.

    Returns:
        Its rows.

    Raises:
        StoreError: Its metadata is not what this version writes.
    """
    metadata = read_metadata(root, name)
    shape = metadata.get("shape")
    if not isinstance(shape, list) or not shape or not isinstance(shape[0], int) or shape[0] < 0:
        raise StoreError(f"{root / name / METADATA_FILE}: its shape is {shape!r}.")
    check_metadata(root / name, metadata, index_metadata(INDEX_ARRAYS[name], shape[0]))
    return int(shape[0])


def read_pixels_shape(root: Path, version: int) -> SlotsShape:
    """The shape of `images/pixels` from its metadata.

    Args:
        root: Folder below which the metadata is.
        version: Format version of the store.

    Returns:
        The shape.

    Raises:
        StoreError: Its metadata is not what this version writes.
    """
    metadata = read_metadata(root, PIXELS)
    try:
        slots, slots_per_part = metadata["shape"][0], metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        shape: SlotsShape = BlockSlots(slots // slots_per_part, slots_per_part)
        if version == VERSION:
            shape = PixelsShape(slots // slots_per_part, slots_per_part, metadata["shape"][1])
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise StoreError(f"{root / PIXELS}: metadata lacks shape or shards.") from error
    compressed = replace(shape, compression=Compression.ZSTD)
    if metadata.get("codecs") == pixels_metadata(compressed)["codecs"]:
        shape = compressed
    check_metadata(root / PIXELS, metadata, pixels_metadata(shape))
    return shape


def read_metadata(root: Path, name: str) -> dict[str, Any]:
    """Read the zarr metadata of an array or group.

    Args:
        root: Folder of the store.
        name: The array or group, such as `images/pixels`.

    Returns:
        The document.

    Raises:
        StoreError: It cannot be read, or is not a JSON object.
    """
    path = root / name / METADATA_FILE
    try:
        return parse_metadata(str(path), path.read_bytes())
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}.") from error


def parse_metadata(path: str, data: bytes) -> dict[str, Any]:
    """Parse a zarr metadata document.

    Args:
        path: Where it came from, for messages.
        data: Its bytes.

    Returns:
        The document.

    Raises:
        StoreError: The bytes are not a JSON object.
    """
    try:
        document = json.loads(data)
    except ValueError as error:
        raise StoreError(f"{path}: not JSON: {error}.") from error
    if not isinstance(document, dict):
        raise StoreError(f"{path}: holds a {type(document).__name__}, a JSON object was expected.")
    return document


def check_metadata(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that an array's metadata is what this version writes.

    Args:
        path: Folder of the array, for messages.
        found: The metadata that was read.
        expected: The metadata that this version writes.

    Raises:
        StoreError: They differ; the message gives every difference.
    """
    keys = ("shape", "data_type", "chunk_grid", "codecs", "fill_value")
    differing = [key for key in keys if found.get(key) != expected[key]]
    wrong = [f"{key} is {found.get(key)!r}, expected {expected[key]!r}" for key in differing]
    if wrong:
        raise StoreError(f"{path / METADATA_FILE}: {'; '.join(wrong)}.")


def chunk_bytes(name: str, rows: int) -> int:
    """The size in bytes of each chunk file of an index array.

    Args:
        name: The array, one of `schema.INDEX_ARRAYS`.
        rows: Rows of the whole array.

    Returns:
        Bytes. All chunk files have this size, since the last of several is padded.
    """
    array = INDEX_ARRAYS[name]
    per_row = int(np.prod(array.row_shape, dtype=np.int64)) * np.dtype(array.dtype).itemsize
    return index_chunk_rows(rows) * per_row


def _map_chunk(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    expected = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    try:
        found = path.stat().st_size
        if found != expected:
            raise StoreError(f"{path}: has {found} bytes, expected {expected}.")
        return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=shape))
    except OSError as error:
        require_descriptors(str(path), error)
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}.") from error
