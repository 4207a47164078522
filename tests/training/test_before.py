"""What `train` finds wrong before ranks start, and what it says where the ranks are asked to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_deepstack.checkpoint.folder import checkpoint_path
from megatron_deepstack.config.schema import DataConfig, Recipe
from megatron_deepstack.errors import DeepStackError, PreemptedError, RankError, RunFolderError
from megatron_deepstack.planning.budget.footprint import checkpoint_bytes, checkpoints_at_once
from megatron_deepstack.platform.files import run_disk as run_folder
from megatron_deepstack.platform.files.run_lock import OWNER_FILE, run_lock
from megatron_deepstack.platform.processes.gang import STOPPED, Gang
from megatron_deepstack.testing.tiny import tiny_recipe
from megatron_deepstack.testing.tiny_store import write_tiny_store
from megatron_deepstack.training import launch
from megatron_deepstack.training.before import check_run_folder


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    store = write_tiny_store(tmp_path / "store.zarr")
    recipe = tiny_recipe()
    return replace(
        recipe,
        run_dir=str(tmp_path / "run"),
        data=DataConfig(store=str(store)),
        train=replace(recipe.train, steps=10),
        checkpoint=replace(recipe.checkpoint, interval=2, keep=2),
    )


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the lock was held, for each time that ranks were started."""
    started: list[bool] = []

    def launch_ranks(function: Any, num_ranks: int, recipe: Recipe, *_: Any, **__: Any) -> None:
        started.append((Path(recipe.run_dir) / OWNER_FILE).exists())
        if len(started) == 1:
            raise RankError("rank 1 was killed")

    monkeypatch.setattr(launch, "launch_ranks", launch_ranks)
    return started


@pytest.mark.parametrize(
    ("interval", "keep", "steps", "expected"),
    [(2, 2, 10, 3), (2, 0, 10, 3), (0, 2, 10, 1), (5, 4, 10, 2), (4, 1, 10, 2), (20, 2, 10, 1)],
)
def test_checkpoints_at_a_time(recipe: Recipe, interval: int, keep: int, steps: int, expected: int) -> None:
    asked = replace(
        recipe,
        train=replace(recipe.train, steps=steps),
        checkpoint=replace(recipe.checkpoint, interval=interval, keep=keep),
    )
    assert checkpoints_at_once(asked) == expected


@pytest.mark.parametrize(("there", "missing"), [((), 3), ((2,), 2), ((2, 4), 1), ((2, 4, 6), 1)])
def test_room_for_the_checkpoints_to_come(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, there: tuple[int, ...], missing: int
) -> None:
    for step in there:
        checkpoint_path(recipe.run_dir, step).mkdir(parents=True)
    free = [missing * checkpoint_bytes(recipe)]

    class Usage:
        @property
        def free(self) -> int:
            return free[0]

    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: Usage())
    check_run_folder(recipe)
    free[0] -= 1
    with pytest.raises(RunFolderError, match=r"free; expected .* for (\d+ checkpoints|a checkpoint)"):
        check_run_folder(recipe)
    checkpoint_path(recipe.run_dir, 10).mkdir(parents=True)
    check_run_folder(recipe)  # a finished run needs no room


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda run_dir: run_dir.write_text(""), "the file that is in the way"),
    "below a file": (lambda run_dir: run_dir.parent.write_text(""), "the file that is in the way"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_cannot_be_written_is_told_before_ranks_start(
    recipe: Recipe, tmp_path: Path, attempts: list[bool], name: str
) -> None:
    spoil, words = REFUSED[name]
    run_dir = tmp_path / "new" / "run" if name == "below a file" else tmp_path / "run"
    spoil(run_dir)
    with pytest.raises(RunFolderError, match=words):
        launch.train_here(replace(recipe, run_dir=str(run_dir)), num_ranks=1, say=print)
    assert attempts == []


def test_the_lock_is_held_over_restarts_and_then_given_back(recipe: Recipe, attempts: list[bool]) -> None:
    said: list[str] = []
    launch.train_here(recipe, num_ranks=1, say=said.append, restarts=1)
    assert attempts == [True, True]
    assert "starting all ranks again" in said[0]
    assert not (Path(recipe.run_dir) / OWNER_FILE).exists()


@pytest.mark.parametrize("what", ["train", "torchrun", "launch"])
def test_a_run_that_goes_on_elsewhere_is_refused(recipe: Recipe, attempts: list[bool], what: str) -> None:
    with (
        run_lock(Path(recipe.run_dir), what, print),
        pytest.raises(RunFolderError, match=rf"`{what}` \(process {os.getpid()} on .* trains in this run folder"),
    ):
        launch.train_here(recipe, num_ranks=1, say=print)
    assert attempts == []


@pytest.mark.parametrize(
    "stopped", [STOPPED, "export: stopped on request; out was not made. Run the same command again"]
)
def test_each_verb_has_its_own_words_for_a_stop(stopped: str) -> None:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=signal.pause)
    process.start()
    theirs.close()
    gang = Gang([process], [ours], stopped)
    gang.ask_to_stop()
    with pytest.raises(PreemptedError) as caught:
        gang.wait()
    assert str(caught.value) == stopped


def test_verbs_say_what_became_of_their_work() -> None:
    from megatron_deepstack.inference import export
    from megatron_deepstack.inference import launch as generate

    assert "go on from the newest checkpoint" in launch._STOPPED
    assert generate._STOPPED == "generate: stopped on request; nothing was written, the same command starts again"
    assert "out was not made" in export._STOPPED.format(output="out")
    for words in (generate._STOPPED, export._STOPPED):
        assert "checkpoint" not in words


def test_an_error_that_only_this_rank_meets_bears_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_deepstack.errors import HealthError, StoreError, of_all_ranks
    from megatron_deepstack.training.main import _named

    monkeypatch.setenv("RANK", "3")
    cases: tuple[tuple[DeepStackError, int | None], ...] = (
        (StoreError("damaged"), 3),
        (of_all_ranks(HealthError("sick")), None),
    )
    for error, rank in cases:
        with pytest.raises(type(error)) as caught, _named():
            raise error
        assert caught.value.rank == rank
