"""Writing a store: whole shards, whole index arrays, and files that exist either completely or not at all.

Nothing is rewritten in place. zarr's own writers read, change and write back a shard for each chunk. That loses chunks
when two processes share a shard (29 of 64 in a trial) and is ten times slower. Here one process owns a shard, streams
its views into a temporary file, and publishes it once it is whole: by a rename after fsync in a folder, as one object
in a bucket.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.schema import (
    INDEX_ARRAYS,
    METADATA_FILE,
    PIXELS,
    VERSION,
    SlotsShape,
    group_metadata,
    index_chunk_path,
    index_chunk_rows,
    index_metadata,
    index_names,
    pixels_metadata,
)
from megatron_deepstack.errors import StoreError


@contextmanager
def atomic_file(path: Location | Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` only when the block ends without an error.

    The block must not let an OSError of another file escape: it would be taken for an error of this one.

    Args:
        path: Where it appears.

    Yields:
        The file, open for writing.

    Raises:
        StoreError: It cannot be written (disk full, no permission).
        LocationError: A bucket fails, or there is no space for the local file from which an object is sent.
    """
    try:
        with Location.parse(path).write() as file:
            yield file
    except OSError as error:
        raise write_error(path, error) from error


def write_json(path: Location | Path, document: Any) -> None:
    """Write indented JSON; the file appears as a whole.

    Args:
        path: Where it is written.
        document: What is written.

    Raises:
        StoreError: It cannot be written.
        LocationError: As `atomic_file` does.
    """
    with atomic_file(path) as file:
        file.write(json_bytes(document))


def json_bytes(document: Any) -> bytes:
    """A JSON document as it is written in every file of a store; keys keep their order."""
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def json_line(document: Any) -> bytes:
    """One line of a JSON-lines file."""
    return (json.dumps(document, ensure_ascii=False) + "\n").encode()


def write_error(path: Location | Path, error: OSError) -> StoreError:
    """What to tell the user about a failed write. The error is returned, not raised.

    Args:
        path: What could not be written.
        error: What the system answered.

    Returns:
        The error to raise.
    """
    return StoreError(
        f"{path}: could not be written: {error.strerror or error}. Nothing half-written is taken for whole: "
        "make room or fix the folder, then run the same command to go on."
    )


def write_skeleton(root: Location | Path, pixels: SlotsShape, attributes: dict[str, Any]) -> None:
    """Write the metadata of the groups and of `images/pixels`; index arrays get theirs when their length is known.

    Args:
        root: The store.
        pixels: Shape of `images/pixels`.
        attributes: The store's attributes, see `StoreAttributes`.

    Raises:
        StoreError: A file cannot be written.
    """
    write_json(_below(root, f"{PIXELS}/{METADATA_FILE}"), pixels_metadata(pixels))
    for group in ("images", "samples"):
        write_json(_below(root, f"{group}/{METADATA_FILE}"), group_metadata())
    write_attributes(root, attributes)


def write_attributes(root: Location | Path, attributes: dict[str, Any]) -> None:
    """Replace the attributes of the store.

    Args:
        root: The store.
        attributes: All of them, see `StoreAttributes`.

    Raises:
        StoreError: The file cannot be written.
    """
    write_json(_below(root, METADATA_FILE), group_metadata(attributes))


def _below(root: Location | Path, name: str) -> Location:
    return Location.parse(root).child(name)


class _AbandonedError(Exception):
    """Ends a file's block so that the file is not published."""


class IndexWriter:
    """One index array, written from front to back in chunks; its metadata follows when its length is known."""

    def __init__(self, root: Location | Path, name: str) -> None:
        self._root = root
        self._array = INDEX_ARRAYS[name]
        self._open = ExitStack()
        self._file: IO[bytes] | None = None
        self._rows = 0

    def append(self, rows: np.ndarray | list[Any]) -> None:
        """Append rows (K x row_shape); when a chunk file is full, the next one is started."""
        array = np.asarray(rows, dtype=self._array.dtype).reshape(-1, *self._array.row_shape)
        chunk_rows = index_chunk_rows(2**63)
        while len(array):
            space = chunk_rows - self._rows % chunk_rows
            if space == chunk_rows:
                self._next_file(self._rows // chunk_rows)
            assert self._file is not None
            with self._blaming():
                self._file.write(np.ascontiguousarray(array[:space]).data)
            self._rows += min(space, len(array))
            array = array[space:]

    def close(self) -> int:
        """Pad the last of several chunks to full size and write the metadata; returns the number of rows."""
        padding = -self._rows % index_chunk_rows(self._rows)
        if padding and self._file is not None:
            row = np.dtype(self._array.dtype).itemsize * int(np.prod(self._array.row_shape, dtype=np.int64))
            with self._blaming():
                self._file.truncate(self._file.tell() + padding * row)
        self._open.close()
        metadata = _below(self._root, f"{self._array.name}/{METADATA_FILE}")
        write_json(metadata, index_metadata(self._array, self._rows))
        return self._rows

    def abandon(self) -> None:
        """Discard the chunk that is being written, if there is one."""
        with suppress(_AbandonedError, OSError), self._open:
            raise _AbandonedError

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """Let the open file name the place of an error: its own folder, or the folder for files to be sent."""
        try:
            yield
        except OSError:
            with self._open:
                raise

    def _next_file(self, chunk: int) -> None:
        self._open.close()
        path = _below(self._root, index_chunk_path(self._array, chunk))
        self._file = self._open.enter_context(path.write())


class IndexWriters:
    """The index writers of a store, by name."""

    def __init__(self, root: Location | Path, version: int) -> None:
        self._writers = {name: IndexWriter(root, name) for name in index_names(version)}

    def append(self, name: str, rows: np.ndarray | list[Any]) -> None:
        """Append rows to an array.

        Args:
            name: The array, one of `schema.index_names`.
            rows: (K, *row_shape) of the array, in anything that numpy converts to its dtype.

        Raises:
            OSError: A file cannot be written; `open_index` makes a StoreError of it.
        """
        self._writers[name].append(rows)

    def close(self) -> None:
        """Complete every array."""
        for writer in self._writers.values():
            writer.close()

    def abandon(self) -> None:
        """Close what is open and write nothing more."""
        for writer in self._writers.values():
            writer.abandon()


@contextmanager
def open_index(root: Location | Path, version: int = VERSION) -> Iterator[IndexWriters]:
    """Write all index arrays of a store; they are complete when the block ends without an error.

    Args:
        root: The store.
        version: Its format version, which decides what index arrays it has.

    Yields:
        The writers of the arrays.

    Raises:
        StoreError: A file cannot be written; the store then stays unfinished, and finalising starts again.
    """
    writers = IndexWriters(root, version)
    try:
        yield writers
        writers.close()
    except OSError as error:
        raise write_error(root, error) from error
    finally:
        writers.abandon()
