"""Values converted as their field's type: paths with `~`, and what interpolations end in."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from megatron_deepstack.config.check import value_at
from megatron_deepstack.config.choices import Part, Precision
from megatron_deepstack.config.constraints import PathError, PathKind, expand_home
from megatron_deepstack.config.fields import leaves
from megatron_deepstack.config.load import load_recipe, recipe_to_yaml
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import ConfigError

PATHS = {field.path: field.type for field in leaves(Recipe) if field.type.path is not None}


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "empty.yaml").touch()
    return tmp_path / "empty.yaml"


def problem_of(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(file, overrides)
    (problem,) = caught.value.problems
    return problem


def test_every_field_of_a_file_or_folder_says_so() -> None:
    """A new text of the schema is a path, or one of these."""
    texts = {field.path for field in leaves(Recipe) if field.type.item is str}
    others = {"name", "logging.wandb_project", "model.vision.kind", "model.language.family"}
    assert texts - set(PATHS) == others | {"data.ignore_keys", "data.transparency", "model.vision.tile_grids"}
    assert {path for path, kind in PATHS.items() if kind.path is PathKind.PATTERN} == {"data.records"}


BESIDE = {"evaluation.images": ["evaluation.file=questions.json"]}
"""Fields without which a path may not be set."""


@pytest.mark.parametrize("path", PATHS)
def test_home_in_each_path(empty: Path, path: str) -> None:
    home, value = empty.parent / "home", "[~/a b, ~/c/*.json]" if PATHS[path].many else "~/a b"
    recipe = load_recipe(empty, [f"{path}={value}", *BESIDE.get(path, [])])
    expected: object = (f"{home}/a b", f"{home}/c/*.json") if PATHS[path].many else f"{home}/a b"
    assert value_at(recipe, path) == expected
    assert "~" not in recipe_to_yaml(recipe)


def test_home_in_a_file_in_one_text_for_a_list_and_behind_interpolations(empty: Path) -> None:
    empty.write_text("run_dir: ~/runs/${name}\ndata: {records: ~/r.json, store: '${run_dir}/st.zarr'}\n")
    recipe, home = load_recipe(empty), empty.parent / "home"
    assert recipe.run_dir == f"{home}/runs/run"
    assert recipe.data.records == (f"{home}/r.json",)
    assert recipe.data.store == f"{home}/runs/run/st.zarr"


def test_home_of_somebody_by_name() -> None:
    known = pwd.getpwuid(0)
    assert expand_home(f"~{known.pw_name}/x") == f"{known.pw_dir.rstrip('/')}/x"


@pytest.mark.parametrize(
    "text", ["s3://~/x", "gs://b/~x", "a/~/b", "./~/x", "x~", "/~", "", "memory://~", "simplecache::s3://~/x", "a$b"]
)
def test_what_is_no_home(text: str) -> None:
    assert expand_home(text) == text


def test_file_urls_are_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    assert expand_home("file://~/x") == "file:///h/x"
    assert expand_home("file:///~/x") == "file:///~/x"


def test_a_recipe_and_its_base_may_lie_at_home(empty: Path) -> None:
    home = empty.parent / "home"
    home.mkdir()
    (home / "base.yaml").write_text("train: {steps: 7}\n")
    (home / "top.yaml").write_text("base: ~/base.yaml\n")
    assert load_recipe("~/top.yaml").train.steps == 7
    with pytest.raises(ConfigError, match="recipe '~nobody-of-that-name/x': expected a path; no home folder is known"):
        load_recipe("~nobody-of-that-name/x")


def test_unknown_homes_are_errors(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(empty, "data.stores=[a, ~nobody-of-that-name/x]")
    assert problem.startswith("data.stores: found ['a', '~nobody-of-that-name/x'], expected a path; no home folder is")
    assert "user 'nobody-of-that-name': write it out, or ./~nobody-of-that-name/x for a folder so named" in problem
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: (_ for _ in ()).throw(KeyError(number)))
    with pytest.raises(PathError, match=r"of the present user, and HOME is not set: write it out, or \./~/x"):
        expand_home("~/x")


def test_variables_of_a_shell_are_not_folders(empty: Path) -> None:
    problem = problem_of(empty, "run_dir=$SCRATCH/run")
    assert "shell variables are not replaced here" in problem
    assert "${oc.env:SCRATCH}/run in a recipe, or ./$SCRATCH/run for a folder of that very name" in problem


CONVERTED = {
    "whole number": ("train.steps", "250", 250),
    "exponent": ("train.steps", "1e3", 1000),
    "number": ("optimizer.lr", "3e-5", 3e-5),
    "whole number for a number": ("optimizer.weight_decay", "1", 1.0),
    "truth": ("train.truncate", "true", True),
    "yes": ("train.truncate", "yes", True),
    "null for a number": ("launch.ranks", "null", None),
    "empty for a number": ("launch.ranks", "", None),
    "number that may be absent": ("launch.ranks", "8", 8),
    "null for a path": ("data.store", "null", None),
    "list of numbers": ("model.stacks.slots", "[4, 5, 6, 7]", (4, 5, 6, 7)),
    "list of names": ("train.trainable", "[vision, language]", (Part.VISION, Part.LANGUAGE)),
    "list of paths": ("data.stores", "[a, b]", ("a", "b")),
    "one path of a list": ("data.records", "a: b.json", ("a: b.json",)),
    "null for a list": ("data.records", "null", None),
    "name of an enum": ("train.precision", "fp32", Precision.FP32),
    "number as a text": ("name", "010", "010"),
    "number as a path": ("run_dir", "2024", "2024"),
    "truth as a text": ("name", "yes", "yes"),
    "home": ("run_dir", "~/x", "HOME/x"),
}


@pytest.mark.parametrize(("path", "text", "meant"), CONVERTED.values(), ids=CONVERTED)
def test_environment_variables_are_of_the_fields_type(
    empty: Path, monkeypatch: pytest.MonkeyPatch, path: str, text: str, meant: object
) -> None:
    monkeypatch.setenv("DS_VALUE", text)
    recipe = load_recipe(empty, [f"{path}=${{oc.env:DS_VALUE}}"])
    found = value_at(recipe, path)
    expected = meant.replace("HOME", str(empty.parent / "home")) if type(meant) is str else meant
    assert found == expected
    assert type(found) is type(expected)
    empty.write_text(recipe_to_yaml(recipe))
    assert load_recipe(empty) == recipe


NOT_CONVERTED = {
    "text for a number": ("train.steps", "many", "found 'many' (from ${oc.env:DS_VALUE}), expected a whole number"),
    "base 8": (
        "train.steps",
        "010",
        "found '010' (from ${oc.env:DS_VALUE}), expected a whole number; write 10 without",
    ),
    "base 60": ("train.steps", "1:30", "found '1:30' (from ${oc.env:DS_VALUE}), expected a whole number"),
    "not YAML": ("optimizer.lr", "[1", "found '[1' (from ${oc.env:DS_VALUE}), expected a number"),
    "empty": ("train.steps", "", "found '' (from ${oc.env:DS_VALUE}), expected a whole number"),
    "truth": ("train.truncate", "2", "found '2' (from ${oc.env:DS_VALUE}), expected true or false"),
    "enum": ("train.precision", "fp31", "found 'fp31' (from ${oc.env:DS_VALUE}), expected one of fp32, bf16, fp8"),
    "list": ("model.stacks.slots", "1,2", "found '1,2' (from ${oc.env:DS_VALUE}), expected a list of numbers"),
    "section": ("train", "5", "found '5' (from ${oc.env:DS_VALUE}), expected a section"),
    "unknown home": ("run_dir", "~no-such-user/x", "'~no-such-user/x' (from ${oc.env:DS_VALUE}), expected a path"),
}


@pytest.mark.parametrize(("path", "text", "message"), NOT_CONVERTED.values(), ids=NOT_CONVERTED)
def test_a_variable_of_another_type_is_named(
    empty: Path, monkeypatch: pytest.MonkeyPatch, path: str, text: str, message: str
) -> None:
    monkeypatch.setenv("DS_VALUE", text)
    assert message in problem_of(empty, f"{path}=${{oc.env:DS_VALUE}}")


def test_interpolations_inside_lists_texts_and_other_fields(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_VALUE", "3")
    empty.write_text(
        "name: run-${oc.env:DS_VALUE}\n"
        "model: {stacks: {slots: [0, '${oc.env:DS_VALUE}', 5, 7]}}\n"
        "train: {steps: '${oc.env:DS_VALUE}0', global_batch_size: '${train.steps}', seed: '${oc.env:DS_NONE,7}'}\n"
        "checkpoint: {interval: '${oc.decode:${oc.env:DS_VALUE}}'}\n"
    )
    recipe = load_recipe(empty)
    assert recipe.name == "run-3"
    assert recipe.model.stacks.slots == (0, 3, 5, 7)
    assert (recipe.train.steps, recipe.train.global_batch_size, recipe.train.seed) == (30, 30, 7)
    assert recipe.checkpoint.interval == 3


def test_a_variable_that_is_not_set_is_named(empty: Path) -> None:
    assert "train.steps: cannot be resolved" in problem_of(empty, "train.steps=${oc.env:DS_NOT_SET}")
    assert "DS_NOT_SET" in problem_of(empty, "train.steps=${oc.env:DS_NOT_SET}")


def test_a_quoted_number_is_a_text(empty: Path) -> None:
    assert "train.steps: found '5', expected a whole number" in problem_of(empty, 'train.steps="5"')
