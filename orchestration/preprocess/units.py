"""Numbers of bytes as people read them."""

from __future__ import annotations

from typing import Final

_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")


def in_units(num_bytes: float) -> str:
    """Bytes in the largest unit of which there is at least one: three figures, such as 1.23 MB or 640 kB."""
    size, unit = float(num_bytes), 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    if unit == 0 or size >= 99.95:
        return f"{size:.0f} {_UNITS[unit]}"
    return f"{size:.1f} {_UNITS[unit]}" if size >= 9.995 else f"{size:.2f} {_UNITS[unit]}"
