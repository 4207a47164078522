"""A run's recipe is read as the run meant it, from whatever folder the command is started in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.build import field_paths
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import DataConfig, EvaluationConfig, Recipe, TrainConfig
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.run_folder.recipe import (
    DATA_PATHS,
    EVALUATION_PATHS,
    TRAIN_PATHS,
    recipe_of_run,
    record_start_folder,
    require_run,
)

DATA = DataConfig(
    records=("data/train.json",),
    tokenizer="data/tokenizer.model",
    store="s3://bucket/x.zarr",
    validation_store="v.zarr",
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder in which a run was started, with the run in it and all that it names."""
    folder = tmp_path / "home"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "tokenizer.model").write_text("a tokenizer")
    write_run(folder / "runs" / "one", replace(Recipe(), run_dir="runs/one", data=DATA))
    return folder


def write_run(run: Path, recipe: Recipe) -> None:
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe_to_yaml(recipe))


def test_relative_paths_count_from_where_the_run_was_started(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = recipe_of_run("home/runs/one").data
    assert data.tokenizer == str(home / "data" / "tokenizer.model")
    assert data.records == (str(home / "data" / "train.json"),), "what is not there is named in full"
    assert data.validation_store == str(home / "v.zarr")
    assert data.store == "s3://bucket/x.zarr"


def test_a_run_moved_with_its_data_finds_it(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    record_start_folder(home / "runs" / "one")
    moved = home.rename(tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    assert recipe_of_run(moved / "runs" / "one").data.tokenizer == str(moved / "data" / "tokenizer.model")


def test_a_run_moved_alone_finds_what_stayed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    record_start_folder(home / "runs" / "one")
    moved = (home / "runs" / "one").rename(tmp_path / "renamed")
    monkeypatch.chdir("/")
    assert recipe_of_run(moved).data.tokenizer == str(home / "data" / "tokenizer.model")


def test_an_absolute_run_folder_with_relative_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, run = tmp_path / "work", tmp_path / "scratch" / "run"
    work.mkdir()
    (work / "t.model").write_text("a tokenizer")
    write_run(run, replace(Recipe(), run_dir=str(run), data=DataConfig(tokenizer="t.model")))
    monkeypatch.chdir(work)
    record_start_folder(run)
    monkeypatch.chdir("/")
    assert recipe_of_run(run).data.tokenizer == str(work / "t.model")


def test_overrides_count_from_the_current_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of_run("home/runs/one", ["data.tokenizer=mine.model", "train.seed=7"])
    assert (recipe.data.tokenizer, recipe.train.seed, recipe.run_dir) == ("mine.model", 7, "home/runs/one")
    with pytest.raises(ConfigError, match=r"did you mean 'data.tokenizer'"):
        recipe_of_run("home/runs/one", ["data.tokeniser=x"])


@pytest.mark.parametrize("name", ["runs #1", "a=b", "${x}", "1:100:3"])
def test_strange_names_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / name, replace(Recipe(), run_dir=name, data=DataConfig(tokenizer=f"{name}/t.model")))
    monkeypatch.chdir("/")
    recipe = recipe_of_run(tmp_path / name)
    assert recipe.run_dir == str(tmp_path / name)
    assert recipe.data.tokenizer == str(tmp_path / name / "t.model")


def test_every_field_that_holds_a_path_is_known() -> None:
    """A new field of text in `data` or `train` has to be put on one side."""
    no_paths = {"template", "compression", "weights", "image_token", "unreadable", "ignore_keys", "transparency"}
    sections = (
        ("data", DataConfig, DATA_PATHS),
        ("train", TrainConfig, TRAIN_PATHS),
        ("evaluation", EvaluationConfig, EVALUATION_PATHS),
    )
    for section, schema, known in sections:
        names = {path.partition(".")[2] for path in field_paths() if path.startswith(f"{section}.")}
        assert set(known) <= names, schema
        texts = {name for name in names if "str" in str(schema.__dataclass_fields__[name].type)}
        assert texts - set(known) - no_paths == set(), "is it a path? then name it in run_folder/recipe.py"


VERBS = {
    "generate": ["generate", "nowhere"],
    "export": ["export", "nowhere", "out"],
    "report": ["report", "nowhere"],
    "report of two": ["report", "nowhere", "never"],
    "status": ["status", "nowhere"],
    "stop": ["stop", "nowhere"],
}


@pytest.mark.parametrize("arguments", VERBS.values(), ids=VERBS)
def test_a_missing_run_has_one_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_where_was_looked_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        require_run("nowhere")
    assert f"since no such folder is there (looked in {tmp_path})" in str(caught.value)
    with pytest.raises(ConfigError, match=r"holds no recipe.yaml; expected the run_dir"):
        require_run(tmp_path)


@pytest.mark.parametrize("verb", ["report", "status", "stop", "ask", "evaluate", "generate"])
def test_a_checkpoint_is_no_run(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder holds a recipe too. A run that lies in the folder of another one stays a run."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_00000002"
    for folder in (run, checkpoint, run / "second"):
        write_run(folder, Recipe())
    result = CliRunner().invoke(app, [verb, str(checkpoint)], env={"COLUMNS": "300"})
    assert result.exit_code == 2, result.output
    assert f"lies in the run {run}; name that run, whose newest checkpoint is taken" in result.output
    assert sorted(path.name for path in checkpoint.iterdir()) == ["recipe.yaml"]
    assert require_run(run / "second") == run / "second" / "recipe.yaml"
