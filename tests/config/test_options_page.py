"""The options page and the editors' schema: made from the schema's classes, current, and true."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from megatron_deepstack.config.explain import field_texts, type_text, value_text
from megatron_deepstack.config.fields import FieldType, leaves, members
from megatron_deepstack.config.load import RECIPES, recipe_to_yaml
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.config.yaml_text import read_yaml

ROOT = Path(__file__).parent.parent.parent
FIELDS = {field.path: field for field in leaves(Recipe)}


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections(schema: type[Any], path: str = "") -> dict[str, type[Any]]:
    found = {path: schema}
    for name, kind in members(schema).items():
        if not isinstance(kind, FieldType):
            found |= sections(kind, f"{path}.{name}" if path else name)
    return found


def test_both_files_are_current() -> None:
    page, schema = tool("options_page"), tool("recipe_schema")
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run python tools/options_page.py"
    assert schema.FILE.read_text(encoding="utf-8") == schema.text(), "run python tools/recipe_schema.py"


def test_the_page_names_each_field_with_its_unit_and_default() -> None:
    said = " ".join(tool("options_page").page().split())
    for path, field in FIELDS.items():
        unit = rf"[^`]*\({re.escape(field.type.unit)}\)" if field.type.unit else ""
        assert re.search(rf"- \*\*`{re.escape(path)}`\*\*:{unit}", said), path
        assert f"`{path}`**: {type_text(field.type)}. Default: `{value_text(field.default)}`." in said


@pytest.mark.parametrize("path", sections(Recipe))
def test_each_field_has_whole_sentences(path: str) -> None:
    schema = sections(Recipe)[path]
    texts = field_texts(schema)
    assert list(texts) == list(members(schema))
    for name, text in texts.items():
        assert text.rstrip(")").endswith((".", "?")), f"{path}.{name}: {text}"
        assert isinstance(members(schema)[name], type) or len(text.split()) >= 4, (
            f"{path}.{name} says too little: {text}"
        )


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("train.steps", "whole number above 0 (steps)"),
        ("checkpoint.keep", "whole number, 0 or more (checkpoints)"),
        ("train.seed", "whole number from 0 to 2147483647"),
        ("optimizer.beta1", "number from 0 to below 1"),
        ("train.truncate", "`true` or `false`"),
        ("train.precision", "one of `fp32`, `bf16`, `fp8`"),
        ("train.trainable", "list of names out of `vision`, `projector`, `language`"),
        ("model.vision.mean", "list of 3 numbers"),
        ("model.stacks.slots", "list of whole numbers, or `null`"),
        ("logging.profile_ranks", "list of whole numbers, 0 or more each"),
        ("data.store", "path or URL, or `null`"),
        ("data.stores", "list of paths or URLs, or one of them, or `null`"),
        ("data.records", "list of paths, URLs or glob patterns, or one of them, or `null`"),
        ("name", "text"),
    ],
)
def test_types_in_words(path: str, words: str) -> None:
    assert type_text(FIELDS[path].type) == words


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = tool("recipe_schema").schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


SHIPPED = [*RECIPES.glob("*.yaml"), *(ROOT / "tests" / "recipes" / "golden").glob("*.yaml")]


@pytest.mark.parametrize("file", sorted(SHIPPED), ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_the_schema_allows_what_ships(validator: Draft202012Validator, file: Path) -> None:
    assert [error.message for error in validator.iter_errors(read_yaml(file.read_text(encoding="utf-8")))] == []


def test_the_schema_allows_the_defaults_and_interpolations(validator: Draft202012Validator) -> None:
    assert validator.is_valid(read_yaml(recipe_to_yaml(Recipe())))
    assert validator.is_valid(read_yaml("{train: {steps: '${oc.env:N}', trainable: ['${x}']}, model: null}"))


@pytest.mark.parametrize(
    "text",
    [
        "train: {stepz: 1}",
        "train: {steps: 0}",
        "train: {steps: 1.5}",
        "train: {steps: 1:30}",
        "train: {precision: fp31}",
        "train: {trainable: [eyes]}",
        "optimizer: {beta1: 1.0}",
        "model: {vision: {std: [1, 1]}}",
        "logging: {profile_ranks: [-1]}",
        "model: {language: {architecture: vicuna_8b}}",
        "name: ' '",
        "data: {images: [a]}",
        "base: 3",
    ],
)
def test_the_schema_refuses_what_the_program_refuses(validator: Draft202012Validator, text: str) -> None:
    assert not validator.is_valid(read_yaml(text))
