"""Checksums of a store's views, and the codec of compressed stores.

The codec is Blosc with zstd and bit shuffle, as zarr v3's `blosc` codec has it. It uses one thread per call: several
threads would append their blocks in the order in which they happen to finish, so that bytes would differ from run to
run, and Blosc's own threads do not survive a fork. Bytes may differ between versions of the library; views do not.
"""

from __future__ import annotations

from typing import Any, Final

import google_crc32c
import numpy as np
from numcodecs import blosc

LEVEL: Final = 1
"""zstd's level; higher levels save less than 1 % more on photos and take several times as long."""

BLOSC_METADATA: Final[dict[str, Any]] = {
    "name": "blosc",
    "configuration": {"typesize": 1, "cname": "zstd", "clevel": LEVEL, "shuffle": "bitshuffle", "blocksize": 0},
}
"""The codec in a zarr v3 metadata document."""

_HEADER_BYTES: Final = 16


class CodecError(Exception):
    """Compressed bytes that do not unpack to a view; the message has no full stop at its end."""


def checksums(views: np.ndarray) -> list[int]:
    """The crc32c of each view before compression; `views` is contiguous, uint8 (N, S, S, 3)."""
    return [google_crc32c.value(view) for view in views]


def compress(view: np.ndarray) -> bytes:
    """Compress a contiguous uint8 array."""
    blosc.use_threads = False
    packed: bytes = blosc.compress(view, b"zstd", LEVEL, blosc.BITSHUFFLE, blosc.AUTOBLOCKS, typesize=1)
    return packed


def decompress(packed: memoryview, out: np.ndarray) -> None:
    """Unpack a view.

    Args:
        packed: What `compress` returned.
        out: Contiguous uint8 array that receives the view.

    Raises:
        CodecError: The bytes are damaged or of another length.
    """
    blosc.use_threads = False
    stored, whole = (int.from_bytes(packed[k : k + 4], "little") for k in (12, 4))
    if len(packed) < _HEADER_BYTES or stored != len(packed) or whole != out.nbytes:
        raise CodecError(
            f"its header promises {stored} bytes that unpack to {whole}, not {len(packed)} and {out.nbytes}"
        )
    try:
        blosc.decompress(packed, out)
    except (RuntimeError, ValueError) as error:
        raise CodecError(f"it does not unpack: {error}") from error
