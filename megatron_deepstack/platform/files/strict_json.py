"""Records as JSON that every parser accepts, although JSON itself has no NaN and no infinities.

A value that is not finite is written as null, and is named under the record's key `not_finite`:

    {"step": 3, "loss": null, "not_finite": {"loss": "nan"}}

Reading restores the value. Records of earlier versions, which hold bare NaN and Infinity, are read as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

NOT_FINITE: Final = "not_finite"
"""Key of a mapping from names of values (with `/` between nested keys) to `nan`, `inf` or `-inf`."""


def to_line(record: Mapping[str, Any]) -> str:
    """Write one record as one line of strict JSON.

    Args:
        record: Plain values. Mappings and lists in it may also hold numbers that are not finite.

    Returns:
        The line, without a newline at its end.
    """
    names: dict[str, str] = {}
    plain = {key: _replaced(value, str(key), names) for key, value in record.items()}
    if names:
        plain[NOT_FINITE] = names
    return json.dumps(plain, allow_nan=False)


def from_line(line: str) -> Any:
    """Read a record from its line.

    Args:
        line: A line that `to_line` has written, or any JSON.

    Returns:
        The value; in a record, NaN and infinities are restored.

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
