"""Writing numbers for people, with a unit that fits their size."""

from __future__ import annotations

from typing import Final

_PREFIXES: Final = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TIMES: Final = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
_BYTES: Final = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def flop_rate(tflops_per_second: float) -> tuple[str, str]:
    """Write a rate in TFLOP/s as a value of three digits and a unit that fits: 0.0064 gives ("6.4", "GFLOP/s")."""
    rate = tflops_per_second * 1e12
    size, prefix = next(((size, prefix) for size, prefix in _PREFIXES if abs(rate) >= size), (1.0, ""))
    value = rate / size
    return (f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"), f"{prefix}FLOP/s"


def flop_scale(unit: str) -> float:
    """Return the factor that turns a number of TFLOP/s into `unit`, such as `GFLOP/s`."""
    return next((1e12 / size for size, prefix in _PREFIXES if unit == f"{prefix}FLOP/s"), 1e12)


def data_size(num_bytes: float) -> str:
    """Write a number of bytes in powers of ten: 1500000 gives `1.5 MB`."""
    size, unit = data_scale(num_bytes)
    value = num_bytes / size
    return f"{value:.0f} {unit}" if size == 1.0 or value >= 100 else f"{value:.3g} {unit}"


def data_scale(num_bytes: float) -> tuple[float, str]:
    """Return the unit that fits a number of bytes, as its size in bytes and its name: (1e6, "MB") for 1500000."""
    return next(((size, unit) for size, unit in _BYTES if num_bytes >= size), (1.0, "bytes"))


def number_of(number: int, noun: str) -> str:
    """Write a number with its noun, such as `1 question` or `1,200 questions`.

    Args:
        number: The number.
        noun: The noun in the singular, whose plural ends in s.

    Returns:
        The text.
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def amount(value: float, unit: str) -> str:
    """Write an amount without its unit, or a size with its unit if the unit is `bytes`.

    Args:
        value: The amount.
        unit: What is counted.

    Returns:
        The whole number, such as `1,200`, or the size, such as `1.5 MB`.
    """
    return data_size(value) if unit == "bytes" else f"{int(value):,}"


def clock(seconds: float) -> str:
    """Write seconds as minutes and seconds, with hours if there are any: 65 gives `1:05`."""
    minutes, rest = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration(seconds: float) -> str:
    """Write a number of seconds in words: 200 gives `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s" if seconds >= 1 else brief_time(seconds)


def brief_time(seconds: float) -> str:
    """Write a time of a step or less with three digits and a unit that fits: 0.00215 gives `2.15 ms`."""
    size, unit = next(((size, unit) for size, unit in _TIMES if seconds >= size), (1.0, "s"))
    return f"{seconds / size:.3g} {unit}"
