"""Write docs/options.md: each field of a recipe with type, unit, range, default, reason. `--check` only compares."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_deepstack.config.architectures import LANGUAGE, VISION
from megatron_deepstack.config.explain import field_texts, section_text, type_text, value_text
from megatron_deepstack.config.fields import Field, FieldType, leaves, members
from megatron_deepstack.config.schema import Recipe

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
_INTRODUCTION = """\
<!-- Written by tools/options_page.py from megatron_deepstack/config/schema; change it there. -->
# Options of a recipe

A recipe is a YAML file with the sections below. Whatever it leaves out has its default, so an empty file is a recipe.
On the command line `section.field=value` overrides a field: `train my.yaml train.steps=200 model.stacks.slots=[0,1]`.
An unknown key, a value of another type and a number out of its range are errors, and all of them are listed at once.

- **Order.** Lowest first: the defaults, the numbers behind a section's `architecture`, the recipe named by `base`, the
  file itself, the overrides. A list replaces the list below it; sections are merged key by key.
- **`base: other.yaml`** at the top of a recipe builds on another one: a path relative to the recipe, or the name of one
  that comes with the package.
- **`model.vision.architecture`** stands for the numbers of a published tower: {vision}.
- **`model.language.architecture`** stands for the numbers of a published decoder: {language}.
- **Numbers** are in base 10: `1000`, `1_000`, `1e3`, `.5`. `010` and `1:30` are refused, as YAML readers disagree about
  them. `0x1f`, `0o17` and `0b11` say their base.
- **Paths** may begin with `~` or `~user` for a home folder. The type says where a URL (`s3://bucket/...`) may stand.
  Relative paths count from the folder in which the command is started.
- **`${{...}}`** takes another field's value (`${{run_dir}}/train.zarr`), or that of an environment variable:
  `${{oc.env:STEPS}}`, or `${{oc.env:STEPS,1000}}` with a default. The text of a variable becomes its field's type.
  `base` takes none.
- **`null`** means "not set", where a field may be so.

An editor that knows JSON Schema completes and checks recipes with [recipe.schema.json](recipe.schema.json): with the
YAML extension of most editors, begin the file with
`# yaml-language-server: $schema=PATH/TO/docs/recipe.schema.json`."""


def page() -> str:
    """The whole page."""
    names = {
        "vision": ", ".join(f"`{name}`" for name in VISION),
        "language": ", ".join(f"`{name}`" for name in LANGUAGE),
    }
    introduction = "\n".join(_wrapped(line) for line in _INTRODUCTION.format(**names).splitlines())
    return "\n\n".join([introduction, *_section(Recipe, "", "The run itself")]) + "\n"


def _section(schema: type[Any], path: str, title: str) -> Iterator[str]:
    """A heading, what the section is, its fields; then the sections inside."""
    prefix, texts = f"{path}." if path else "", field_texts(schema)
    yield f"## {title}"
    yield "\n\n".join(map(_wrapped, section_text(schema).split("\n\n")))
    for field in leaves(schema, prefix):
        if "." not in field.path.removeprefix(prefix):
            yield _entry(field, texts[field.name])
    for name, kind in members(schema).items():
        if not isinstance(kind, FieldType):
            yield from _section(kind, f"{prefix}{name}", f"`{prefix}{name}`")


def _entry(field: Field, text: str) -> str:
    head = f"- **`{field.path}`**: {type_text(field.type)}. Default: `{value_text(field.default)}`."
    return f"{_wrapped(head)}\n\n{_wrapped(text, '  ')}"


def _wrapped(text: str, indent: str = "") -> str:
    """Text in lines of at most 120 characters; those after the first of a list's item are indented."""
    further = "  " if text.startswith("- ") else indent
    return textwrap.fill(
        text, 120, initial_indent=indent, subsequent_indent=further, break_long_words=False, break_on_hyphens=False
    )


def main() -> None:
    """Compare or write; the exit code is 1 if `--check` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 where something differs")
    check_only = parser.parse_args().check
    if check_only:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        sys.exit(not current and "docs/options.md is not current; run python tools/options_page.py")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
