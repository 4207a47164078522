"""Checksums of a store's views, and the codec of a compressed store's.

The codec is Blosc with zstd and bit shuffle, as zarr v3's `blosc` codec has it. One thread per call: several would
append their blocks in the order in which they happen to finish, so that bytes differed from run to run, and Blosc's own
threads do not survive a fork. Bytes may differ between versions of the library; views do not.
"""

from __future__ import annotations

from typing import Any, Final

import google_crc32c
import numpy as np
from numcodecs import blosc

LEVEL: Final = 1
"""zstd's level; higher ones save less than a hundredth more on photos and take several times as long."""

BLOSC_METADATA: Final[dict[str, Any]] = {
    "name": "blosc",
    "configuration": {"typesize": 1, "cname": "zstd", "clevel": LEVEL, "shuffle": "bitshuffle", "blocksize": 0},
}
"""The codec in a zarr v3 metadata document."""

_HEADER_BYTES: Final = 16


class CodecError(Exception):
    """Compressed bytes that do not unpack to a view; the message has no full stop."""


def checksums(views: np.ndarray) -> list[int]:
    """The crc32c of each view (contiguous uint8, N x S x S x 3), before compression."""
    return [google_crc32c.value(view) for view in views]


def compress(view: np.ndarray) -> bytes:
    """A contiguous uint8 array, compressed."""
    blosc.use_threads = False
    packed: bytes = blosc.compress(view, b"zstd", LEVEL, blosc.BITSHUFFLE, blosc.AUTOBLOCKS, typesize=1)
    return packed


def decompress(packed: memoryview, out: np.ndarray) -> None:
    """Unpack into `out`, contiguous uint8; raises CodecError where the bytes are damaged or of another length."""
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
