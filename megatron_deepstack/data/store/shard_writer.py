"""Writing one shard of `images/pixels`: chunks without gaps in slot order, then the shard's index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import google_crc32c
import numpy as np

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.codec import compress
from megatron_deepstack.data.store.direct_file import DirectFile
from megatron_deepstack.data.store.schema import EMPTY_CHUNK, SlotsShape, shard_index_bytes
from megatron_deepstack.data.store.writer import atomic_file


class ShardWriter:
    """One shard of `images/pixels`, written slot by slot and closed once.

    It holds only the slots being appended, and 4 MiB that are about to be written. The chunks follow each other without
    gaps in slot order, and then the index.
    """

    def __init__(self, file: DirectFile, shape: SlotsShape) -> None:
        self._file = file
        self._shape = shape
        self._sizes: list[int] = []

    @property
    def used(self) -> int:
        """Slots filled so far."""
        return len(self._sizes)

    @property
    def num_bytes(self) -> int:
        """The size in bytes that the shard would have if it were finished now."""
        return sum(self._sizes) + shard_index_bytes(self._shape)

    def append(self, slots: np.ndarray) -> None:
        """Append the slots of one image: its views, or the blocks of them.

        Args:
            slots: uint8 (N, *slot_shape).
        """
        assert slots.dtype == np.uint8, slots.dtype
        assert slots.shape[1:] == self._shape.slot_shape, (slots.shape, self._shape)
        if self._shape.compression is not Compression.NONE:
            for slot in slots:
                self.append_chunk(compress(slot))
            return
        self._count([self._shape.slot_bytes] * len(slots))
        self._file.write(np.ascontiguousarray(slots).data)

    def append_chunk(self, chunk: bytes | memoryview) -> None:
        """Append one slot as it is stored in another shard of the same codec."""
        self._count([len(chunk)])
        self._file.write(chunk)

    def _count(self, sizes: list[int]) -> None:
        assert self.used + len(sizes) <= self._shape.slots_per_part, (self.used, len(sizes), self._shape)
        self._sizes += sizes

    def finish(self) -> None:
        """Write the shard index and its checksum."""
        index = np.full((self._shape.slots_per_part, 2), EMPTY_CHUNK, dtype="<u8")
        index[: self.used, 0] = np.cumsum([0, *self._sizes])[:-1]
        index[: self.used, 1] = self._sizes
        raw = index.tobytes()
        self._file.write(raw + google_crc32c.value(raw).to_bytes(4, "little"))
        self._file.finish()


@contextmanager
def open_shard(root: Location | Path, part: int, shape: SlotsShape) -> Iterator[ShardWriter]:
    """Write one shard; it appears in the store when the block ends without an error.

    Args:
        root: The store.
        part: The part whose shard it is.
        shape: Shape of `images/pixels`.

    Yields:
        The writer, to which the block appends slots.

    Raises:
        StoreError: The file cannot be written.
        LocationError: As `writer.atomic_file` does.
    """
    path = Location.parse(root).child(shape.shard_path(part))
    with atomic_file(path) as file, closing(DirectFile(file)) as direct:
        writer = ShardWriter(direct, shape)
        yield writer
        writer.finish()
