"""Results as one JSON document on stdout, and completion of recipe names by the shell."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout, and nothing else there.")]


def print_json(document: Mapping[str, Any] | list[Any]) -> None:
    """Print one document to stdout. NaN and infinity are refused, because JSON cannot write them."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


@contextmanager
def stdout_for_results(wanted: bool) -> Iterator[None]:
    """While this is open, everything written to stdout goes to stderr, also from libraries and other processes."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package; this reads a folder and imports nothing."""
    return sorted(file.stem for file in (Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def complete_recipe(incomplete: str) -> list[str]:
    """What a shell offers for RECIPE: matching names of recipes, and matching YAML files and folders."""
    names = [name for name in recipe_names() if name.startswith(incomplete)]
    folder, _, beginning = incomplete.rpartition("/")
    try:
        there = sorted(Path(folder or ("/" if incomplete.startswith("/") else ".")).iterdir())
    except OSError:
        there = []
    prefix = f"{folder}/" if "/" in incomplete else ""
    files = [
        f"{prefix}{path.name}{'/' if path.is_dir() else ''}"
        for path in there
        if path.name.startswith(beginning)
        and (path.suffix in (".yaml", ".yml") or path.is_dir())
        and not path.name.startswith(".")
    ]
    return names + files
