"""Stopping and going on: bit for bit the run without a stop, and damage named instead of trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_deepstack.checkpoint.folder import checkpoint_path, newest_whole, verify
from megatron_deepstack.config.choices import Part
from megatron_deepstack.config.schema import DataConfig, LanguageConfig, ParallelConfig, Recipe
from megatron_deepstack.errors import CheckpointError, DataError, RankError, StoreError
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_model
from megatron_deepstack.testing.tiny import tiny_recipe as tiny_run
from megatron_deepstack.testing.tiny_data import record, write_photos, write_records, write_tokenizer
from orchestration.preprocess.driver.run import preprocess

Pools = Callable[[int], RankPool]
STEPS = 6


def train_on_rank(rank: int, recipe: Recipe, stop_after: int | None) -> None:
    """`training.main.train` on a rank of a pool, which has joined already."""
    from megatron_deepstack.training.loop import run

    run(recipe, groups_for(recipe.parallel), stop_after)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A tiny recipe with a store of a few photos, one record without and one with two images."""
    folder = tmp_path_factory.mktemp("resume")
    names = write_photos(folder / "images", 6)
    records = [record(n, [name]) for n, name in enumerate(names)] + [record("text", []), record("two", names[:2])]
    data = DataConfig(
        records=(str(write_records(folder / "records.json", records)),),
        images=str(folder / "images"),
        tokenizer=str(write_tokenizer(folder / "tokenizer.model")),
        store=str(folder / "store.zarr"),
    )
    language = LanguageConfig(vocab_size=512, hidden_size=32, ffn_hidden_size=48, num_layers=8, num_heads=4)
    run = tiny_run(tiny_model(language=language), ParallelConfig(pipeline=2), global_batch_size=3)
    run = replace(run, data=data, train=replace(run.train, steps=STEPS), run_dir=str(folder / "run"))
    preprocess(run, str(data.store), workers=0)
    return run


def records_of(run_dir: str | Path) -> list[tuple[int, float, float]]:
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"], r["gradient_norm"]) for r in map(json.loads, lines)]


@pytest.fixture(scope="module")
def whole(ranks: Pools, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run on two stages that nothing stopped."""
    run = replace(recipe, run_dir=str(tmp_path_factory.mktemp("whole") / "run"))
    ranks(2).run(train_on_rank, run, None)
    assert len(records_of(run.run_dir)) == STEPS
    return run


@pytest.fixture(scope="module")
def written(ranks: Pools, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, stopped after four steps, with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run = replace(recipe, run_dir=str(folder), checkpoint=replace(recipe.checkpoint, interval=2))
    ranks(2).run(train_on_rank, run, 4)
    assert records_of(folder)[-1][0] == 4
    return folder


@pytest.fixture
def stopped(recipe: Recipe, written: Path, tmp_path: Path) -> Recipe:
    """A copy of the stopped run of the test's own."""
    shutil.copytree(written, tmp_path / "run")
    return replace(recipe, run_dir=str(tmp_path / "run"), checkpoint=replace(recipe.checkpoint, interval=2))


def test_resumed_run_is_bitwise_the_same(ranks: Pools, whole: Recipe, stopped: Recipe) -> None:
    """Epochs of 8 samples end inside batches of 3. `test_resume_cases` has every layout."""
    ranks(2).run(train_on_rank, stopped, None)
    assert records_of(stopped.run_dir) == records_of(whole.run_dir)


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(ParallelConfig(tensor=2), id="tp2", marks=pytest.mark.slow),
        pytest.param(ParallelConfig(), id="one"),
    ],
)
def test_another_layout_goes_on(ranks: Pools, whole: Recipe, stopped: Recipe, parallel: ParallelConfig) -> None:
    """A checkpoint of two stages read by two tp ranks, and by one rank: the same losses within rounding."""
    ranks(parallel.tensor).run(train_on_rank, replace(stopped, parallel=parallel), None)
    for ours, theirs in zip(records_of(stopped.run_dir), records_of(whole.run_dir), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)


def damage(run: Recipe, step: int, how: str) -> None:
    folder = checkpoint_path(run.run_dir, step)
    largest = max((f for f in folder.iterdir() if f.name != "manifest.json"), key=lambda f: f.stat().st_size)
    if how == "flipped bit":
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif how == "truncated":
        largest.write_bytes(largest.read_bytes()[:-10])
    elif how == "missing file":
        largest.unlink()
    else:
        (folder / "manifest.json").unlink()


@pytest.mark.parametrize("how", ["flipped bit", "truncated", "missing file", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(stopped: Recipe, how: str) -> None:
    damage(stopped, 4, how)
    with pytest.raises(CheckpointError, match="step_00000004"):
        verify(checkpoint_path(stopped.run_dir, 4))
    checkpoint, faults = newest_whole(stopped.run_dir)
    assert checkpoint is not None
    assert checkpoint.manifest.step == 2
    assert len(faults) == 1
    damage(stopped, 2, how)
    with pytest.raises(CheckpointError, match="no whole checkpoint among 2"):
        newest_whole(stopped.run_dir)


def test_an_unfinished_save_does_not_count(stopped: Recipe) -> None:
    folder = checkpoint_path(stopped.run_dir, 4)
    folder.rename(folder.with_name(folder.name + ".partial"))
    checkpoint, faults = newest_whole(stopped.run_dir)
    assert checkpoint is not None
    assert (checkpoint.manifest.step, faults) == (2, [])


def _error(pool: RankPool, recipe: Recipe) -> Exception:
    with pytest.raises(RankError) as caught:
        pool.run(train_on_rank, recipe, None)
    cause = caught.value.__cause__
    assert isinstance(cause, Exception)
    return cause


def test_another_model_is_refused(ranks: Pools, stopped: Recipe) -> None:
    """Every difference is listed with both values."""
    language = replace(stopped.model.language, rope_theta=5e5)
    other = replace(stopped, model=replace(stopped.model, language=language))
    other = replace(other, train=replace(other.train, seed=7, trainable=(Part.LANGUAGE,)))
    error = _error(ranks(2), other)
    assert isinstance(error, CheckpointError)
    for words in ("model.language.rope_theta: 10000.0", "500000.0", "train.seed", "train.trainable"):
        assert words in str(error)


def test_a_store_that_does_not_fit_is_refused(ranks: Pools, recipe: Recipe, tmp_path: Path) -> None:
    """Samples that are too long, and a folder that is no store: before anything is trained."""
    run = replace(recipe, run_dir=str(tmp_path / "run"))
    short = replace(run, train=replace(run.train, seq_length=20))
    error = _error(ranks(2), short)
    assert isinstance(error, DataError)
    assert "exceed train.seq_length 20" in str(error)
    missing = replace(run, data=replace(run.data, store=str(tmp_path / "nothing.zarr")))
    assert isinstance(_error(ranks(2), missing), StoreError)
