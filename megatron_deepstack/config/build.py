"""From a plain mapping to a Recipe, strictly.

Each value must have the type that its field declares. A value is converted only where no other meaning is possible: a
whole number to a float and back, `yes` to true, `~` at the start of a path to the home folder, and the text that an
interpolation such as `${oc.env:NAME}` gives. Unknown keys, wrong types and unknown names of an enum are collected with
their dotted path. A wrong field keeps its default, so that the rest can still be checked at the same time. `check`
judges what the values mean together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

from megatron_deepstack.config.constraints import PathError, expand_home
from megatron_deepstack.config.fields import FieldType, leaves, members
from megatron_deepstack.config.problems import Problem, did_you_mean
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.config.yaml_text import NotYaml, number_hint, parse_scalar, read_yaml

T = TypeVar("T")

_TRUTHS: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""The words for true and false in YAML 1.1. `y` and `n` are left out, since PyYAML reads them as text too."""


class Interpolated(str):
    """A text that came from an interpolation. It is converted to the type of its field."""

    source: str
    """The interpolation as written, such as `${oc.env:STEPS}`."""

    def __new__(cls, text: str, source: str) -> Interpolated:
        made = super().__new__(cls, text)
        made.source = source
        return made


class _Refused(Exception):
    """A value does not fit its field; the message says what was expected."""


def build_recipe(mapping: Mapping[Any, Any], problems: list[Problem]) -> Recipe:
    """Build a recipe from plain values.

    Args:
        mapping: The recipe as nested dicts, lists and scalars.
        problems: List to which everything that is wrong is appended.

    Returns:
        The recipe. Fields that have a problem, or are not given, hold their default.
    """
    return _section(Recipe, mapping, "", problems)


def field_paths() -> tuple[str, ...]:
    """Return the dotted paths of all fields of a recipe, without the sections themselves."""
    return tuple(field.path for field in leaves(Recipe))


def _section(schema: type[T], value: object, path: str, problems: list[Problem]) -> T:
    """Build one dataclass. An empty YAML section (null) gives its defaults."""
    known = members(schema)
    if value is None or value == "~":
        return schema()
    if not isinstance(value, Mapping):
        text = f"found {_show(value)}, expected a section with keys {', '.join(known)}"
        problems.append(Problem(paths=(path,), text=text))
        return schema()
    prefix = f"{path}." if path else ""
    good: dict[str, Any] = {}
    for key, item in value.items():
        if key in known:
            _fill(good, key, known[key], item, prefix + key, problems)
        else:
            problems.append(_unknown(list(known), str(key), item, prefix))
    return schema(**good)


def _fill(
    good: dict[str, Any], key: str, kind: type[Any] | FieldType, item: object, path: str, problems: list[Problem]
) -> None:
    if not isinstance(kind, FieldType):
        good[key] = _section(kind, item, path, problems)
        return
    try:
        good[key] = _convert(kind, _typed(kind, item) if isinstance(item, Interpolated) else item)
    except _Refused as refusal:
        problems.append(Problem(paths=(path,), text=f"found {_show(item)}, expected {refusal}"))


def _unknown(siblings: Sequence[str], key: str, value: object, prefix: str) -> Problem:
    """Report an unknown key, with the nearest key of its section, or else a field of that name in another section."""
    hint = did_you_mean(key, siblings)
    if hint:
        hint = hint.replace("'", f"'{prefix}", 1)
    else:
        elsewhere = [leaf for leaf in field_paths() if leaf.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f"; did you mean '{elsewhere[0]}'?" if elsewhere else f"; known here: {', '.join(siblings)}"
    shown = "" if isinstance(value, Mapping) else f" (value {_show(value)})"
    return Problem(paths=(f"{prefix}{key}",), text=f"unknown key{shown}{hint}")


def _typed(kind: FieldType, text: Interpolated) -> object:
    """Read an interpolation's text as if it were written in the recipe, for a field of this kind."""
    if kind.optional and parse_scalar(text) is None:
        return None
    if kind.item is str and not (kind.many and text.startswith("[")):
        return str(text)
    try:
        return read_yaml(text)
    except NotYaml:
        return str(text)  # the field's type refuses it, and the message shows it


def _convert(kind: FieldType, value: object) -> Any:
    """Convert `value` to the field's type, or raise _Refused with what was expected."""
    if value == "~" and (kind.optional or kind.path):
        if kind.item is str:
            home = ", or ~/ for the home folder" if kind.path else ""
            raise _Refused(f"{_PATH if kind.path else 'text'}; `~` alone is null to YAML: write null for none{home}")
        return None
    if value is None and kind.optional:
        return None
    return _tuple(kind, value) if kind.many else _item(kind, value)


def _tuple(kind: FieldType, value: object) -> tuple[Any, ...]:
    if kind.item is str and isinstance(value, str):
        return (_item(kind, value),)  # a list of one text may be written without brackets
    if not isinstance(value, (list, tuple)):
        raise _Refused(f"a list of {_plural(kind.item)}")
    if kind.length is not None and len(value) != kind.length:
        raise _Refused(f"a list of {kind.length} values")
    return tuple(_item(kind, item) for item in value)


def _plural(item: type[Any]) -> str:
    """Say in words what a list's items may be."""
    if issubclass(item, StrEnum):
        return f"names out of {', '.join(item)}, such as [{next(iter(item))}]"
    if item is str:
        return "texts, or one text"
    return "numbers, such as [1, 2]"


def _item(kind: FieldType, value: object) -> Any:
    """Convert a single value, or one item of a list."""
    if isinstance(value, Interpolated):
        value = _typed(FieldType(item=kind.item), value)
    if kind.path is not None:
        return _path(value)
    return _enum(kind.item, value) if issubclass(kind.item, StrEnum) else _SCALARS[kind.item](value)


def _enum(item: type[StrEnum], value: object) -> StrEnum:
    names = [str(member) for member in item]
    if isinstance(value, str) and value in names:
        return item(value)
    near = did_you_mean(value, names) if isinstance(value, str) else ""
    raise _Refused(f"one of {', '.join(names)}{near}")


def _bool(value: object) -> bool:
    truth = _TRUTHS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(truth, bool):
        raise _Refused("true or false")
    return truth


def _int(value: object) -> int:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # YAML reads 1e3 as a float
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Refused(f"a whole number{_hint(value)}")
    if abs(value) >= 2**63:
        raise _Refused("a whole number of at most 63 bits")
    return value


def _float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Refused(f"a number{_hint(value)}")
    if not math.isfinite(value) or abs(value) > 1e300:
        raise _Refused("a finite number")
    return float(value)


def _hint(value: object) -> str:
    return number_hint(value) if isinstance(value, str) else ""


def _str(value: object) -> str:
    if isinstance(value, str) and "\0" not in value:
        return str(value)
    if isinstance(value, (int, float)):
        raise _Refused("text; put it in quotes (in an override: 'section.field=\"...\"')")
    raise _Refused("text")


def _path(value: object) -> str:
    try:
        return expand_home(_str(value))
    except PathError as error:
        raise _Refused(str(error)) from error


_PATH: Final = "a path"
_SCALARS: Final[dict[Any, Callable[[object], Any]]] = {bool: _bool, int: _int, float: _float, str: _str}


def _show(value: object) -> str:
    """Show a value as a user would recognise it: in YAML's words, and at most one line of it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = "a section" if isinstance(value, Mapping) else repr(value)
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return f"{shown} (from {value.source})" if isinstance(value, Interpolated) else shown


def defaults(schema: type[Any]) -> dict[str, Any]:
    """Return the defaults of a schema as nested plain values, to which interpolations may refer."""
    values: dict[str, Any] = plain(schema())
    return values


def plain(value: object) -> Any:
    """Turn dataclasses, enums and tuples into the dicts, strings and lists that YAML knows."""
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value
