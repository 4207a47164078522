"""The schema in words: the string below each field, and types, ranges and defaults as text.

The options page and the JSON schema for editors are made from this, so they cannot disagree with what is checked.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from megatron_deepstack.config.fields import FieldType


def section_text(schema: type[Any]) -> str:
    """Return the docstring of a section's class, with the lines of each paragraph joined."""
    paragraphs = (inspect.getdoc(schema) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def field_texts(schema: type[Any]) -> Mapping[str, str]:
    """Return the string below each field of a dataclass, as one line each, by the name of the field.

    They are read from the source file, since Python does not keep them.
    """
    (definition,) = ast.parse(inspect.getsource(schema)).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for before, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and isinstance(after, ast.Expr):
            texts[before.target.id] = " ".join(ast.literal_eval(after.value).split())
    return texts


def type_text(kind: FieldType) -> str:
    """Say in Markdown what a field may hold, such as `whole number above 0 (tokens)`."""
    if issubclass(kind.item, StrEnum):
        names = ", ".join(f"`{name}`" for name in kind.item)
        text = f"list of names out of {names}" if kind.many else f"one of {names}"
    else:
        text = _plain_type(kind)
    return f"{text}, or `null`" if kind.optional else text


def _plain_type(kind: FieldType) -> str:
    if kind.item is bool:
        return "`true` or `false`"
    if kind.form is not None:
        return f"text: {kind.form.words}"
    name = kind.path or {int: "whole number", float: "number", str: "text"}[kind.item]
    if kind.many:
        count = f"{kind.length} " if kind.length else ""
        item = "paths, URLs or glob patterns" if kind.path and "glob" in kind.path else _plural(str(name))
        name = f"list of {count}{item}"
        if kind.item is str:
            name += ", or one of them"
    if kind.range is not None:
        text = str(kind.range)
        name += f" {text.removeprefix('a number ')}" if text.startswith("a number ") else f", {text}"
        name += " each" if kind.many else ""
    return f"{name} ({kind.unit})" if kind.unit else str(name)


def _plural(name: str) -> str:
    return " or ".join(f"{word}s" for word in name.split(" or "))


def value_text(value: Any) -> str:
    """Write a default as YAML would, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)
