"""Reading views straight out of shards: one `preadv` for neighbouring views, indices and open files cached."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final

import google_crc32c
import numpy as np

from megatron_deepstack.data.schema import EMPTY_CHUNK, PixelsShape, shard_path

_OPEN_SHARDS: Final = 128
"""Shards kept open, with their indices: 5 KB each for DeepStack-L, 26 KB for DeepStack-HD."""


class ShardError(Exception):
    """A shard is missing, short or without the view asked for; the message ends in a full stop."""


class ShardCache:
    """Open shards and their indices, the most recently used ones."""

    def __init__(self, root: Path, pixels: PixelsShape) -> None:
        self._root = root
        self._pixels = pixels
        self._lock = threading.Lock()
        self._open: OrderedDict[int, tuple[BinaryIO, np.ndarray]] = OrderedDict()

    def read(self, slots: Sequence[int], out: np.ndarray) -> None:
        """Read the views in `slots`, rows of `images/pixels`, into `out`; neighbours in one call."""
        offsets: list[int] = []
        for part, slot in (divmod(slot, self._pixels.slots_per_part) for slot in slots):
            offset, size = self._shard(part)[1][slot].tolist()
            if offset == EMPTY_CHUNK or size != self._pixels.view_bytes:
                raise ShardError(f"{self._root / shard_path(part)}: slot {slot} was never written.")
            offsets.append(offset)
        first = 0
        for last in range(1, len(slots) + 1):
            part = slots[first] // self._pixels.slots_per_part
            together = last < len(slots) and slots[last] // self._pixels.slots_per_part == part
            if not together or offsets[last] != offsets[last - 1] + self._pixels.view_bytes:
                self._read_bytes(part, offsets[first], out[first:last])
                first = last

    def _read_bytes(self, part: int, offset: int, out: np.ndarray) -> None:
        """Fill `out` from `offset` of a shard; the system may hand over fewer bytes than asked for."""
        file = self._shard(part)[0]
        rest = out.reshape(-1).data
        while rest:
            count = os.preadv(file.fileno(), [rest], offset)
            if count == 0:
                raise ShardError(f"{self._root / shard_path(part)}: the shard ends before byte {offset + len(rest)}.")
            rest, offset = rest[count:], offset + count

    def _shard(self, part: int) -> tuple[BinaryIO, np.ndarray]:
        """Open file and index (uint64 (slots, 2): offset and length) of a shard.

        An evicted file is closed by its last user's reference going away, so no thread reads through a recycled
        descriptor.
        """
        with self._lock:
            shard = self._open.get(part)
            if shard is None:
                shard = self._open[part] = self._open_shard(part)
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(part)
            return shard

    def _open_shard(self, part: int) -> tuple[BinaryIO, np.ndarray]:
        path = self._root / shard_path(part)
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - stays open in the cache
        except OSError as error:
            raise ShardError(f"{path}: the shard cannot be opened: {error.strerror or error}.") from error
        index_bytes = self._pixels.slots_per_part * 16
        position = os.fstat(file.fileno()).st_size - index_bytes - 4
        raw = os.pread(file.fileno(), index_bytes + 4, position) if position >= 0 else b""
        if len(raw) != index_bytes + 4 or google_crc32c.value(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
            file.close()
            raise ShardError(f"{path}: the shard's index is damaged or cut off.")
        return file, np.frombuffer(raw[:-4], dtype="<u8").reshape(-1, 2)
