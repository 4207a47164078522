"""From a plain mapping to a Recipe, strictly.

Each value must have the type its field declares; the only conversion is from a whole number to a float. Unknown
keys, wrong types and unknown names of an enum are collected with their dotted path; a bad field keeps its default,
so that the rest can still be checked in the same go. What the values mean together is left to `check`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from megatron_deepstack.config.problems import Problem, did_you_mean
from megatron_deepstack.config.schema import Recipe

T = TypeVar("T")


class _Refused(Exception):
    """A value does not fit its field; the message says what was expected."""


def build_recipe(mapping: Mapping[Any, Any], problems: list[Problem]) -> Recipe:
    """A recipe from plain dicts, lists and scalars; what is wrong is appended to `problems`."""
    return _section(Recipe, mapping, "", problems)


def field_paths() -> tuple[str, ...]:
    """Dotted paths of all fields of a recipe, without the sections themselves."""
    return tuple(_leaves(Recipe, ""))


def _leaves(schema: type[Any], prefix: str) -> list[str]:
    paths = []
    for name, hint in _hints(schema).items():
        paths += _leaves(_as_type(hint), f"{prefix}{name}.") if is_dataclass(hint) else [f"{prefix}{name}"]
    return paths


def _hints(schema: type[Any]) -> dict[str, Any]:
    """Field names and resolved types of a dataclass, in order."""
    return get_type_hints(schema)


def _section(schema: type[T], value: object, path: str, problems: list[Problem]) -> T:
    """One dataclass; an empty YAML section (None) is its defaults."""
    hints = _hints(schema)
    if value is None:
        return schema()
    if not isinstance(value, Mapping):
        text = f"found {_show(value)}, expected a section with keys {', '.join(hints)}"
        problems.append(Problem(paths=(path,), text=text))
        return schema()
    prefix = f"{path}." if path else ""
    good: dict[str, Any] = {}
    for key, item in value.items():
        if key in hints:
            _fill(good, key, hints[key], item, prefix + key, problems)
        else:
            problems.append(_unknown(list(hints), str(key), item, prefix))
    return schema(**good)


def _fill(good: dict[str, Any], key: str, hint: Any, item: object, path: str, problems: list[Problem]) -> None:
    if is_dataclass(hint):
        good[key] = _section(_as_type(hint), item, path, problems)
        return
    try:
        good[key] = _convert(hint, item)
    except _Refused as refusal:
        problems.append(Problem(paths=(path,), text=f"found {_show(item)}, expected {refusal}"))


def _as_type(hint: Any) -> type[Any]:
    assert isinstance(hint, type), hint
    return hint


def _unknown(siblings: Sequence[str], key: str, value: object, prefix: str) -> Problem:
    """Nearest key of the same section first, then a field of that name in another section."""
    hint = did_you_mean(key, siblings)
    if hint:
        hint = hint.replace("'", f"'{prefix}", 1)
    else:
        elsewhere = [leaf for leaf in field_paths() if leaf.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f"; did you mean '{elsewhere[0]}'?" if elsewhere else f"; known here: {', '.join(siblings)}"
    shown = "" if isinstance(value, Mapping) else f" (value {_show(value)})"
    return Problem(paths=(f"{prefix}{key}",), text=f"unknown key{shown}{hint}")


def _convert(hint: Any, value: object) -> Any:
    """`value` as the field's type, or _Refused with what was expected."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        inner = [option for option in get_args(hint) if option is not NoneType]
        assert len(inner) == 1, f"{hint}: only X | None is supported"
        return None if value is None else _convert(inner[0], value)
    if origin is tuple:
        return _tuple(get_args(hint), value)
    if issubclass(hint, StrEnum):
        return _enum(hint, value)
    return _SCALARS[hint](value)


def _tuple(items: Sequence[Any], value: object) -> tuple[Any, ...]:
    if items == (str, Ellipsis) and isinstance(value, str):
        return (_str(value),)  # one of what there may be several
    if not isinstance(value, (list, tuple)):
        raise _Refused(f"a list of {_plural(items[0])}")
    if items[-1] is Ellipsis:
        return tuple(_convert(items[0], item) for item in value)
    if len(value) != len(items):
        raise _Refused(f"a list of {len(items)} values")
    return tuple(_convert(hint, item) for hint, item in zip(items, value, strict=True))


def _plural(hint: Any) -> str:
    """What a list's items may be, in words."""
    if issubclass(hint, StrEnum):
        return f"names out of {', '.join(hint)}, such as [{next(iter(hint))}]"
    if hint is str:
        return "texts, or one text"
    return "numbers, such as [1, 2]"


def _enum(hint: type[StrEnum], value: object) -> StrEnum:
    names = [str(member) for member in hint]
    if isinstance(value, str) and value in names:
        return hint(value)
    near = did_you_mean(value, names) if isinstance(value, str) else ""
    raise _Refused(f"one of {', '.join(names)}{near}")


def _bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise _Refused("true or false")
    return value


def _int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Refused("a whole number")
    if abs(value) >= 2**63:
        raise _Refused("a whole number of at most 63 bits")
    return value


def _float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Refused("a number")
    if not math.isfinite(value) or abs(value) > 1e300:
        raise _Refused("a finite number")
    return float(value)


def _str(value: object) -> str:
    if isinstance(value, str) and "\0" not in value:
        return value
    if isinstance(value, (int, float)):
        raise _Refused("text; put it in quotes (in an override: 'section.field=\"...\"')")
    raise _Refused("text")


_SCALARS: dict[Any, Callable[[object], Any]] = {bool: _bool, int: _int, float: _float, str: _str}


def _show(value: object) -> str:
    """A value as a user would recognise it: YAML's words, and not more than a line of it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = "a section" if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def defaults(schema: type[Any]) -> dict[str, Any]:
    """The defaults of a schema as nested plain values, which interpolations may refer to."""
    values: dict[str, Any] = {}
    hints = _hints(schema)
    for item in fields(schema):
        hint = hints[item.name]
        if is_dataclass(hint):
            values[item.name] = defaults(_as_type(hint))
        else:
            assert item.default is not MISSING, f"{schema.__name__}.{item.name} needs a default"
            values[item.name] = plain(item.default)
    return values


def plain(value: object) -> Any:
    """Dataclasses, enums and tuples as the dicts, strings and lists that YAML knows."""
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value
