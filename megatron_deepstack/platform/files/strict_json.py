"""Records as JSON that every parser takes: NaN and infinities, which JSON has not, are written by name.

A value that is not finite is written as null, and named in the record's own `not_finite`:

    {"step": 3, "loss": null, "not_finite": {"loss": "nan"}}

Reading puts it back. Records of earlier versions, which hold bare NaN and Infinity, are read as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

NOT_FINITE: Final = "not_finite"
"""Key of the mapping from names (with `/` between a mapping's name and its key) to `nan`, `inf` or `-inf`."""


def to_line(record: Mapping[str, Any]) -> str:
    """One record as one line of strict JSON, without its newline.

    Args:
        record: Plain values; mappings and lists in it may hold numbers that are not finite too.

    Returns:
        The line.
    """
    names: dict[str, str] = {}
    plain = {key: _replaced(value, str(key), names) for key, value in record.items()}
    if names:
        plain[NOT_FINITE] = names
    return json.dumps(plain, allow_nan=False)


def from_line(line: str) -> Any:
    """A record from its line.

    Args:
        line: Written by `to_line`, or any JSON.

    Returns:
        What it holds; in a record NaN and infinities stand where they stood.

    Raises:
        ValueError: It is not JSON.
    """
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get(NOT_FINITE), dict):
        return record
    for name, value in record.pop(NOT_FINITE).items():
        _put(record, str(name).split("/"), float(value))
    return record


def _replaced(value: Any, name: str, names: dict[str, str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        names[name] = str(value)
        return None
    if isinstance(value, Mapping):
        return {key: _replaced(one, f"{name}/{key}", names) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(one, f"{name}/{number}", names) for number, one in enumerate(value)]
    return value


def _put(found: Any, path: list[str], value: float) -> None:
    *above, last = path
    for key in above:
        found = found[int(key)] if isinstance(found, list) else found[key]
    if isinstance(found, list):
        found[int(last)] = value
    else:
        found[last] = value
