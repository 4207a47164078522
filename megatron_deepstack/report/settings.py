"""Recipes as tables: one recipe with its changes in bold, or the differences of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from megatron_deepstack.config.build import plain
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.report.drawing.svg import Markup, element, joined


def recipe_table(recipe: Recipe) -> Markup:
    """A table of every field, in bold if it differs from the default."""
    return element("div", *_sections(recipe, Recipe(), "run"), class_="recipe")


def differences(recipes: Sequence[Recipe]) -> list[tuple[str, list[str]]]:
    """The fields in which recipes differ, without the name and the folder of the run.

    Args:
        recipes: Recipes to compare.

    Returns:
        For each such field its path, and its value in each recipe.
    """
    flat = [dict(_flat(recipe, "")) for recipe in recipes]
    return [
        (path, values)
        for path in flat[0]
        if path not in ("name", "run_dir") and len(set(values := [one[path] for one in flat])) > 1
    ]


def _flat(config: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from _flat(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", _shown(value)


def _sections(config: Any, default: Any, title: str) -> Iterator[Markup]:
    """A table of a section's own fields, then those of the sections inside it."""
    rows, inner = [], []
    for item in fields(config):
        value, usual = getattr(config, item.name), getattr(default, item.name)
        if is_dataclass(value):
            inner.append((value, usual, item.name if title == "run" else f"{title}.{item.name}"))
        else:
            cells = joined(element("td", item.name), element("td", _shown(value)))
            rows.append(element("tr", cells, class_="set" if value != usual else None))
    if rows:
        yield element("div", element("h3", title), element("table", *rows))
    for value, usual, name in inner:
        yield from _sections(value, usual, name)


def _shown(value: object) -> str:
    """A value as it is written in a recipe's YAML."""
    value = plain(value)
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value is None else str(value)
