"""The fields of the schema as values: path, type, constraints and default of each.

The dataclasses of the schema are read once, here. All code that needs to know what a field may hold uses this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, TypeGuard, Union, get_args, get_origin, get_type_hints

from megatron_deepstack.config.constraints import Matches, NotBlank, PathKind, Range, Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldType:
    """What a field may hold: a value, null if `optional`, or a list of values if `many`."""

    item: type[Any]
    """Type of the value: bool, int, float, str or an enum of names. For a list it is the type of the items."""
    optional: bool = False
    """null is allowed."""
    many: bool = False
    """The field holds a list."""
    length: int | None = None
    """Number of items of a list; None for any number."""
    range: Range | None = None
    """Range of the number, or of each number of the list."""
    unit: str | None = None
    """What the number counts or measures."""
    path: PathKind | None = None
    """What kind of path a text is; None for other texts."""
    form: Matches | None = None
    """The form that a text must have."""
    not_blank: bool = False
    """A text that must hold more than white space."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One field of a recipe."""

    path: str
    """Dotted path, such as `train.steps`."""
    type: FieldType
    """What it may hold."""
    default: Any
    """Value where a recipe does not set it."""

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition(".")[2]


def is_section(hint: object) -> TypeGuard[type[Any]]:
    """Whether the type of a field is a section, which has fields itself."""
    return isinstance(hint, type) and is_dataclass(hint)


def members(schema: type[Any]) -> Mapping[str, type[Any] | FieldType]:
    """Return the fields of one dataclass in order, by name: the class of a section, or what a field may hold."""
    key: Any = schema  # mypy does not take a type for hashable
    return _members(key)


@cache
def _members(schema: type[Any]) -> Mapping[str, type[Any] | FieldType]:
    hints = get_type_hints(schema, include_extras=True)
    return {name: hint if is_section(hint) else _field_type(hint) for name, hint in hints.items()}


def leaves(schema: type[Any], prefix: str = "") -> tuple[Field, ...]:
    """Return all fields of a schema and of its sections, in order.

    Args:
        schema: A dataclass of the schema.
        prefix: What the fields' paths begin with, such as `train.`; empty for the recipe itself.

    Returns:
        The fields, without the sections themselves.
    """
    return tuple(_leaves(schema, prefix))


def _leaves(schema: type[Any], prefix: str) -> Iterator[Field]:
    defaults = {item.name: item.default for item in fields(schema)}
    for name, kind in members(schema).items():
        if isinstance(kind, FieldType):
            assert defaults[name] is not MISSING, f"{schema.__name__}.{name} needs a default"
            yield Field(path=f"{prefix}{name}", type=kind, default=defaults[name])
        else:
            yield from leaves(kind, f"{prefix}{name}.")


def _field_type(hint: Any) -> FieldType:
    """A resolved annotation such as `tuple[Annotated[int, POSITIVE], ...] | None`, taken apart."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    (inner,) = (option for option in options if option is not NoneType)
    items = get_args(inner) if get_origin(inner) is tuple else ()
    item, constraints = _constraints(items[0] if items else inner)
    assert isinstance(item, type), hint
    by_class = {type(constraint): constraint for constraint in constraints}
    unit = by_class.get(Unit)
    return FieldType(
        item=item,
        optional=len(options) > 1,
        many=bool(items),
        length=len(items) if items and Ellipsis not in items else None,
        range=by_class.get(Range),
        unit=unit.name if unit else None,
        path=by_class.get(PathKind),
        form=by_class.get(Matches),
        not_blank=NotBlank in by_class,
    )


def _constraints(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    if get_origin(hint) is Annotated:
        inner, *constraints = get_args(hint)
        return inner, tuple(constraints)
    return hint, ()
