"""Whether an image file is whole, for formats whose decoders do not report it: checksums, end marks, sizes.

Pillow silently returns the picture of a PNG that lacks its end, or whose data has a wrong checksum. Such a file can be
used, but it is flagged, because something has happened to it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final

_PNG_HEADER: Final = 8
_JPEG_2000_END: Final = b"\xff\xd9"


def find_damage(data: bytes, kind: str) -> str | None:
    """What is wrong with the file of a picture that Pillow could decode.

    Args:
        data: The file's bytes.
        kind: Pillow's name of its format.

    Returns:
        What is wrong, in words; None if nothing was found.
    """
    check = _CHECKS.get(kind)
    return None if check is None else check(data)


def _check_png(data: bytes) -> str | None:
    """Chunks are length, name, content, crc32; the last is IEND."""
    at = _PNG_HEADER
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        name = data[at + 4 : at + 8]
        if end + 4 <= len(data) and zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return f"damaged PNG: the checksum of its chunk {name.decode('latin-1')!r} is wrong"
        if name == b"IEND":
            return None
        at = end + 4
    return "truncated PNG: it has no IEND chunk"


def _check_gif(data: bytes) -> str | None:
    """Blocks follow a header and a colour table; the last is the trailer."""
    at = 13 + _gif_table_bytes(data[10])
    while at < len(data):
        kind = data[at]
        if kind == 0x3B:
            return None
        if kind == 0x2C and at + 10 < len(data):
            at = _gif_blocks_end(data, at + 11 + _gif_table_bytes(data[at + 9]))
        elif kind == 0x21:
            at = _gif_blocks_end(data, at + 2)
        else:
            return f"damaged GIF: an unknown block at byte {at}"
    return "truncated GIF: it has no trailer"


def _gif_table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _gif_blocks_end(data: bytes, at: int) -> int:
    while at < len(data) and data[at]:
        at += data[at] + 1
    return at + 1


def _check_bmp(data: bytes) -> str | None:
    size = int.from_bytes(data[2:6], "little")
    return f"truncated BMP: {len(data)} of its {size} bytes" if len(data) < size else None


def _check_jpeg_2000(data: bytes) -> str | None:
    return None if data.rstrip(b"\0").endswith(_JPEG_2000_END) else "truncated JPEG 2000: it has no end marker"


_CHECKS: Final[dict[str, Callable[[bytes], str | None]]] = {
    "PNG": _check_png,
    "GIF": _check_gif,
    "BMP": _check_bmp,
    "JPEG2000": _check_jpeg_2000,
}
