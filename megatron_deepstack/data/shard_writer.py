"""Writing one shard of `images/pixels`: chunks back to back in slot order, then the shard's index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import google_crc32c
import numpy as np

from megatron_deepstack.data.schema import EMPTY_CHUNK, PixelsShape, shard_path
from megatron_deepstack.data.writer import atomic_file


class ShardWriter:
    """One shard of `images/pixels`, written view by view and closed once.

    Holds no more than the views being appended. The chunks lie back to back in slot order; the index follows.
    """

    def __init__(self, file: IO[bytes], shape: PixelsShape) -> None:
        self._file = file
        self._shape = shape
        self._used = 0

    @property
    def used(self) -> int:
        """Slots filled so far."""
        return self._used

    def append(self, views: np.ndarray) -> list[int]:
        """Append the views (uint8, N x S x S x 3) of one image; returns the crc32c of each."""
        assert views.dtype == np.uint8, views.dtype
        assert views.shape[1:] == self._shape.view_shape, (views.shape, self._shape)
        assert self._used + len(views) <= self._shape.slots_per_part, (self._used, len(views), self._shape)
        views = np.ascontiguousarray(views)
        self._file.write(views.data)
        self._used += len(views)
        return [google_crc32c.value(view) for view in views]

    def finish(self) -> None:
        """Write the shard index and its checksum."""
        index = np.full((self._shape.slots_per_part, 2), EMPTY_CHUNK, dtype="<u8")
        index[: self._used, 0] = np.arange(self._used, dtype=np.uint64) * self._shape.view_bytes
        index[: self._used, 1] = self._shape.view_bytes
        raw = index.tobytes()
        self._file.write(raw + google_crc32c.value(raw).to_bytes(4, "little"))


@contextmanager
def open_shard(root: Path, part: int, shape: PixelsShape) -> Iterator[ShardWriter]:
    """Write the shard of `part`; it appears in the store when the block ends without an error."""
    with atomic_file(root / shard_path(part)) as file:
        writer = ShardWriter(file, shape)
        yield writer
        writer.finish()


def shard_bytes(shape: PixelsShape, used: int) -> int:
    """Size in bytes of a shard with `used` views."""
    return used * shape.view_bytes + shape.slots_per_part * 16 + 4
