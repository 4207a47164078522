"""Write docs/recipe.schema.json, with which editors complete and check recipes. `--check` only compares.

The schema allows what the program reads: numbers in a list or alone as the schema's dataclasses have them, `${...}` in
place of any value, `architecture` in the sections of the model, and `base` at the top.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_deepstack.config.architectures import LANGUAGE, VISION
from megatron_deepstack.config.build import plain
from megatron_deepstack.config.constraints import Range
from megatron_deepstack.config.explain import field_texts, section_text
from megatron_deepstack.config.fields import FieldType, members
from megatron_deepstack.config.schema import LanguageConfig, Recipe, VisionConfig

FILE = Path(__file__).parent.parent / "docs" / "recipe.schema.json"
_INTERPOLATION = {"$ref": "#/$defs/interpolation"}
_ARCHITECTURES: Mapping[type[Any], Mapping[str, Any]] = {VisionConfig: VISION, LanguageConfig: LANGUAGE}
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, draft 2020-12."""
    recipe = _section(Recipe)
    recipe["properties"] = {
        "base": {"type": "string", "description": "Recipe that this one builds on: a path relative to it, or a name."},
        **recipe["properties"],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of megatron-deepstack",
        "$defs": {"interpolation": {"type": "string", "pattern": r"\$\{.+\}", "description": "another field's value"}},
        **recipe,
    }


def _section(section: type[Any]) -> dict[str, Any]:
    texts = field_texts(section)
    properties: dict[str, Any] = {}
    if section in _ARCHITECTURES:
        text = "Published model whose numbers this section begins with."
        properties["architecture"] = {"enum": list(_ARCHITECTURES[section]), "description": text}
    defaults = plain(section())
    for name, kind in members(section).items():
        if isinstance(kind, FieldType):
            properties[name] = {**_field(kind), "default": defaults[name], "description": texts[name]}
        else:
            properties[name] = _section(kind)
    return {
        "description": section_text(section),
        "type": ["object", "null"],
        "properties": properties,
        "additionalProperties": False,
    }


def _field(kind: FieldType) -> dict[str, Any]:
    item = _item(kind)
    forms = [item]
    if kind.many:
        sizes = {"minItems": kind.length, "maxItems": kind.length} if kind.length else {}
        forms = [{"type": "array", "items": {"anyOf": [item, _INTERPOLATION]}, **sizes}]
        forms += [item] if kind.item is str else []
    forms += [{"type": "null"}] if kind.optional else []
    return {"anyOf": [*forms, _INTERPOLATION]}


def _item(kind: FieldType) -> dict[str, Any]:
    if issubclass(kind.item, StrEnum):
        return {"enum": [str(name) for name in kind.item]}
    described: dict[str, Any] = {"type": _TYPES[kind.item]}
    if kind.range is not None:
        described |= _limits(kind.range)
    if kind.form is not None:
        described["pattern"] = f"^(?:{kind.form.pattern})$"
    if kind.not_blank:
        described["pattern"] = r"\S"
    return described


def _limits(allowed: Range) -> dict[str, float]:
    limits = {
        "minimum": allowed.least,
        "exclusiveMinimum": allowed.above,
        "maximum": allowed.most,
        "exclusiveMaximum": allowed.below,
    }
    return {name: value for name, value in limits.items() if value is not None}


def text() -> str:
    """The file's content."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Compare or write; the exit code is 1 if `--check` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 where something differs")
    check_only = parser.parse_args().check
    if check_only:
        current = FILE.is_file() and FILE.read_text(encoding="utf-8") == text()
        sys.exit(not current and "docs/recipe.schema.json is not current; run python tools/recipe_schema.py")
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
