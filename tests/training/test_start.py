"""How a run starts on all ranks: in phases that they leave together, from the newest checkpoint first of all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_deepstack.checkpoint.folder import step_folders
from megatron_deepstack.config.choices import Layers, Unreadable
from megatron_deepstack.config.schema import DataConfig, HealthConfig, ParallelConfig, Recipe
from megatron_deepstack.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeepStackError,
    HealthError,
    RunFolderError,
    StoreError,
)
from megatron_deepstack.platform.files.strict_json import from_line
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_recipe
from megatron_deepstack.testing.tiny_store import write_tiny_store

Pools = Callable[[int], RankPool]
Met = tuple[type[DeepStackError], str, int | None, bool] | None


def train(rank: int, recipes: list[Recipe], stop_after: int | None = None) -> Met:
    """Train on one rank of two; what it raises, which rank that names, and whether all ranks agree."""
    from megatron_deepstack.training.loop import run

    try:
        run(recipes[rank], groups_for(recipes[rank].parallel), stop_after)
    except DeepStackError as error:
        return type(error), str(error), error.rank, error.agreed
    return None


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_store(tmp_path_factory.mktemp("start") / "store.zarr")


@pytest.fixture
def recipe(store: Path, tmp_path: Path) -> Recipe:
    recipe = tiny_recipe(parallel=ParallelConfig(pipeline=2))
    return replace(
        recipe,
        run_dir=str(tmp_path / "run"),
        data=DataConfig(store=str(store)),
        train=replace(recipe.train, steps=3),
        checkpoint=replace(recipe.checkpoint, interval=2),
    )


def on_data(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, data=replace(recipe.data, **changes))


def a_file(path: Path) -> Path:
    path.write_text("in the way")
    return path


ALONE: dict[str, tuple[Callable[[Recipe, Path], Recipe], type[DeepStackError], str]] = {
    "no store": (lambda r, p: on_data(r, store=str(p / "gone")), StoreError, "gone: no such folder"),
    "no tokenizer": (lambda r, p: on_data(r, tokenizer=str(p / "gone")), DataError, "data.tokenizer: .*gone is not"),
    "no starting weights": (
        lambda r, p: replace(r, train=replace(r.train, init_from=(str(p / "gone"),))),
        CheckpointError,
        "gone: no such file or folder",
    ),
    "no Transformer Engine": (
        lambda r, p: replace(r, model=replace(r.model, layers=Layers.TRANSFORMER_ENGINE)),
        ConfigError,
        "needs a GPU and the package transformer_engine",
    ),
    "another store": (
        lambda r, p: on_data(r, store=str(write_tiny_store(p / "other", seed=1))),
        ConfigError,
        "data.plan_hash: .*, and on rank 0 .*stores of the same content",
    ),
    "a run folder that is a file": (
        lambda r, p: replace(r, run_dir=str(a_file(p / "file"))),
        RunFolderError,
        "file.* cannot be written .*the file that is in the way",
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_one_rank_meets_all_ranks_raise(ranks: Pools, recipe: Recipe, tmp_path: Path, name: str) -> None:
    change, kind, words = ALONE[name]
    first, second = ranks(2).run(train, [recipe, change(recipe, tmp_path)])
    assert first == second
    assert first is not None
    assert (first[0], first[2], first[3]) == (kind, 1, True)
    assert re.search(words, first[1]), first[1]
    assert not step_folders(recipe.run_dir)


def test_starting_weights_may_be_gone_once_there_is_a_checkpoint(ranks: Pools, recipe: Recipe, tmp_path: Path) -> None:
    """They are not looked at, so that a run outlives what it started from, and a restart does not read them again."""
    pool = ranks(2)
    assert pool.run(train, [recipe] * 2, 2) == [None, None]
    gone = replace(recipe, train=replace(recipe.train, init_from=(str(tmp_path / "gone"),)))
    assert pool.run(train, [gone] * 2) == [None, None]
    assert [step for step, _ in step_folders(recipe.run_dir)] == [2, 3]


@pytest.mark.parametrize("fewer", [0, 1], ids=["as many steps", "fewer steps"])
def test_a_finished_run_builds_and_writes_nothing(ranks: Pools, recipe: Recipe, fewer: int) -> None:
    pool = ranks(2)
    assert pool.run(train, [recipe] * 2) == [None, None]
    files = (Path(recipe.run_dir) / "recipe.yaml", Path(recipe.run_dir) / "metrics.jsonl")
    before = [(file.read_text(), file.stat().st_mtime_ns) for file in files]
    asked = replace(recipe, train=replace(recipe.train, steps=3 - fewer))
    assert pool.run(train, [asked] * 2) == [None, None]
    assert [(file.read_text(), file.stat().st_mtime_ns) for file in files] == before


def test_a_finished_run_says_so(recipe: Recipe) -> None:
    from megatron_deepstack.training.loop import _nothing_to_do

    assert _nothing_to_do(recipe, 3, None) == "nothing to do: 3 of 3 steps are done; raise train.steps to go on"
    assert _nothing_to_do(recipe, 5, 4) == "nothing to do: 5 of 3 steps are done; raise train.steps to go on"
    assert "2 of 3 steps are done, and --stop-after asks for 1; raise it" in _nothing_to_do(recipe, 2, 1)


def without_pixels(folder: Path) -> Path:
    """A store all of whose samples have an image, and none can be read."""
    root = write_tiny_store(folder, samples=((0,), (4,), (5, 0), (6,)))
    shutil.rmtree(root / "images" / "pixels" / "c")
    return root


def without_targets(folder: Path) -> Path:
    """A store whose loss masks are all zero."""
    root = write_tiny_store(folder)
    (file,) = (root / "samples" / "loss_mask" / "c").iterdir()
    file.write_bytes(bytes(file.stat().st_size))
    return root


NOTHING: dict[str, tuple[Callable[[Path], Path], str]] = {
    "unreadable": (without_pixels, "no sample could be read"),
    "no targets": (without_targets, "no sample has a target: all loss masks are zero"),
}


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("limit", [10, 1], ids=["at its end", "at the limit"])
def test_steps_without_anything_to_learn_are_left_out_and_end_the_run(
    ranks: Pools, recipe: Recipe, tmp_path: Path, name: str, limit: int
) -> None:
    make, reason = NOTHING[name]
    sick = replace(
        on_data(recipe, store=str(make(tmp_path / "sick")), unreadable=Unreadable.SKIP),
        health=HealthConfig(max_skipped_steps=limit),
    )
    first, second = ranks(2).run(train, [sick] * 2)
    assert first == second
    assert first is not None
    assert (first[0], first[2], first[3]) == (HealthError, None, True)
    expected = (
        f"2 steps in a row were left out (the last one: {reason}); health.max_skipped_steps allows 1"
        if limit == 1
        else f"nothing was learned: all 3 steps were left out (the last one: {reason})"
    )
    assert expected in first[1]
    assert "step 2: tiny-" in first[1], "samples are named"
    assert "store verify" in first[1]
    assert step_folders(sick.run_dir) == []
    lines = (Path(sick.run_dir) / "metrics.jsonl").read_text().splitlines()
    found = [from_line(line) for line in lines]
    assert [(one["loss"], one["applied"], one["skipped_because"]) for one in found] == [(None, False, reason)] * len(
        lines
    )
    assert [one["skipped_steps"] for one in found] == list(range(1, 1 + (2 if limit == 1 else 3)))
