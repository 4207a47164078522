"""The watchdog: who is silent, who waits, and what is said."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from waiting import wait_until

from megatron_deepstack.errors import CheckpointError, HangError, RankError
from megatron_deepstack.platform.processes.local_ranks import launch_ranks
from megatron_deepstack.training.guard.heartbeat import read_beats, silent_ranks
from megatron_deepstack.training.guard.node_board import Beat
from megatron_deepstack.training.guard.watchdog import PATIENT, Watchdog, hang_message, last_hang

HANG_SECONDS = 4.0
"""Beats, and the time to tell of a hang, are shares of it. With 2 s a busy machine ended a rank before it had told."""


def beat(rank: int, number: int, *, hanging: bool = False) -> Beat:
    return Beat(rank, f"node{rank}", 100 + rank, number, "step 12", hanging)


def test_silent_ranks() -> None:
    """One goes on, one does not, one has found the hang and left, one was never heard of."""
    before = {0: beat(0, 1), 1: beat(1, 7), 2: beat(2, 4, hanging=True)}
    after = {0: beat(0, 2), 1: beat(1, 7), 2: beat(2, 4, hanging=True)}
    assert silent_ranks(before, after, 4) == (1, 3)


def test_a_rank_heard_of_for_the_first_time_is_not_silent() -> None:
    assert silent_ranks({}, {0: beat(0, 1)}, 1) == ()


def test_the_message_names_ranks_and_hosts() -> None:
    beats = {0: beat(0, 3), 1: beat(1, 7)}
    message = hang_message(beats, (1, 2), 3, 31.4, 30.0, Path("run/stacks"))
    assert "no progress for 31 s (health.hang_seconds 30)" in message
    assert "silent: rank 1 (pid 101 on node1, in step 12), rank 2 (never heard of)" in message
    assert "waiting: rank 0 (pid 100 on node0, in step 12)" in message
    assert "run/stacks" in message
    assert "every rank is alive" in hang_message(beats, (), 2, 31.4, 30.0, Path("run/stacks"))


def _watched(folder: str, behaviour: str) -> str:
    """Two ranks of which none, one or both make progress, without any process group."""
    rank = int(os.environ["RANK"])
    with Watchdog(Path(folder), rank, 2, hang_seconds=HANG_SECONDS) as watchdog:
        watchdog.progress("step 1")
        if behaviour == "fine":
            wait_until(lambda: watchdog.progress("step 2") or past_the_limit(watchdog), "more beats")
        elif behaviour == "patient":
            watchdog.progress("saving", PATIENT)
            wait_until(lambda: past_the_limit(watchdog), "more beats")
        elif behaviour == "one stops" and rank == 0:
            wait_until(lambda: watchdog.progress("step 2"), "the end of this process")
        else:
            _a_place_to_be_found()
    return "ended"


def past_the_limit(watchdog: Watchdog) -> bool:
    """Whether more beats were written than a rank without progress lives for."""
    return watchdog.beats._number * watchdog.beat_seconds > 1.25 * watchdog.hang_seconds


def _a_place_to_be_found() -> None:
    threading.Event().wait()


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ["fine", "patient"])
def test_progress_is_left_alone(tmp_path: Path, behaviour: str) -> None:
    """A run folder keeps the story of its last hang, and the next attempt is not ended by it."""
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "hang.txt").write_text("an old story")
    assert launch_ranks(_watched, 2, str(tmp_path), behaviour) == "ended"
    assert last_hang(tmp_path) == "an old story"
    assert read_beats(tmp_path)[1].doing == "nothing: it has ended"
    assert len(list((tmp_path / "heartbeats").iterdir())) == 1, "one file for the node, and nothing unfinished"


@pytest.mark.parametrize("behaviour", ["one stops", pytest.param("both stop", marks=pytest.mark.slow)])
def test_every_rank_shows_its_stacks(tmp_path: Path, behaviour: str) -> None:
    """A rank that hears of another's hang shows its own stack too, and ends with it, although it gets on."""
    with pytest.raises(HangError, match="found the run hanging"):
        launch_ranks(_watched, 2, str(tmp_path), behaviour)
    assert "every rank is alive, and none gets on" in last_hang(tmp_path)
    for rank in range(2):
        stack = (tmp_path / "stacks" / f"rank_{rank:05d}.txt").read_text()
        assert "_watched" in stack
        assert ("_a_place_to_be_found" in stack) is (rank == 1 or behaviour == "both stop")


class FullDisk:
    """Within it every file of this process is refused."""

    def __enter__(self) -> FullDisk:
        self._write_text = Path.write_text

        def refuse(path: Path, *_: object, **__: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        Path.write_text = refuse  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Path.write_text = self._write_text  # type: ignore[method-assign]


def _hangs_on_a_full_disk(folder: str) -> None:
    with FullDisk(), Watchdog(Path(folder), int(os.environ["RANK"]), 2, hang_seconds=2.0):
        _a_place_to_be_found()


@pytest.mark.slow
def test_a_hang_on_a_full_disk_is_shown_and_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No beat, stack or call can be written: each rank finds the hang by itself and says so on its standard error."""
    with pytest.raises(HangError, match="found the run hanging"):
        launch_ranks(_hangs_on_a_full_disk, 2, str(tmp_path))
    told = capfd.readouterr().err
    assert "error: the run hangs" in told
    assert "_a_place_to_be_found" in told


def _disk_refuses_and_recovers(run_dir: Path) -> None:
    with ExitStack() as full, Watchdog(run_dir, 0, 1, hang_seconds=5.0) as watchdog:
        with FullDisk():
            number = watchdog.beats._number
            wait_until(lambda: watchdog.beats._number > number + 1)
        wait_until(lambda: watchdog.beats.read().get(0, beat(0, 0)).number > number + 1)
        full.enter_context(FullDisk())
        raise CheckpointError("the error in flight")


def test_a_refused_beat_ends_neither_the_watch_nor_replaces_the_error_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the error in flight"):
        _disk_refuses_and_recovers(tmp_path)


def test_retryable() -> None:
    assert HangError.retryable
    assert RankError.retryable
