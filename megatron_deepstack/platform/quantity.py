"""Numbers with a unit that fits their size, for people."""

from __future__ import annotations

from typing import Final

_PREFIXES: Final = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BYTES: Final = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def flop_rate(tflops_per_second: float) -> tuple[str, str]:
    """A rate given in TFLOP/s as a value of three digits and its unit: 0.0064 is ("6.4", "GFLOP/s")."""
    rate = tflops_per_second * 1e12
    size, prefix = next(((size, prefix) for size, prefix in _PREFIXES if abs(rate) >= size), (1.0, ""))
    value = rate / size
    return (f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"), f"{prefix}FLOP/s"


def flop_scale(unit: str) -> float:
    """What a number of TFLOP/s is multiplied with to be in `unit`."""
    return next((1e12 / size for size, prefix in _PREFIXES if unit == f"{prefix}FLOP/s"), 1e12)


def data_size(num_bytes: float) -> str:
    """Bytes in powers of ten: 1500000 is `1.5 MB`."""
    size, unit = next(((size, unit) for size, unit in _BYTES if num_bytes >= size), (1.0, "bytes"))
    value = num_bytes / size
    return f"{value:.0f} {unit}" if size == 1.0 or value >= 100 else f"{value:.3g} {unit}"


def number_of(number: int, noun: str) -> str:
    """`1 question`, `1,200 questions`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def count(value: float, unit: str) -> str:
    """A whole number of things, or a size where they are `bytes`."""
    return data_size(value) if unit == "bytes" else f"{int(value):,}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as short as they can be read: 65 is `1:05`."""
    minutes, rest = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
