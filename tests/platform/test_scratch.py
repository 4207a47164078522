"""Scratch folders: shared by their holders, gone with the last of them, swept when their holders were killed."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_deepstack.platform.files import scratch
from megatron_deepstack.platform.files.scratch import hold, hold_new, sweep

HOLDER = """
import sys
from pathlib import Path
from megatron_deepstack.platform.files.scratch import hold_new
held = hold_new(Path(sys.argv[1]), "x")
print(held.path, flush=True)
sys.stdin.read()
"""


def test_the_last_holder_removes_it(tmp_path: Path) -> None:
    first, second = hold(tmp_path, "x-shared"), hold(tmp_path, "x-shared")
    assert first.path == second.path
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o700
    first.release()
    first.release()
    assert second.path.is_dir()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_new_ones_do_not_meet(tmp_path: Path) -> None:
    with hold_new(tmp_path, "x") as first, hold_new(tmp_path, "x") as second:
        assert first.path != second.path
    assert list(tmp_path.iterdir()) == []


def test_a_kept_one_stays_until_the_next(tmp_path: Path) -> None:
    with hold_new(tmp_path, "x") as first:
        first.kept = True
    assert first.path.is_dir()
    with hold_new(tmp_path, "x") as second:
        assert [path.name for path in tmp_path.iterdir()] == [second.path.name]


def test_what_a_killed_process_left_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        (theirs / "content").touch()
        sweep(tmp_path, "x")
        assert theirs.is_dir()
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert theirs.is_dir()
    sweep(tmp_path, "another kind")
    assert theirs.is_dir()
    sweep(tmp_path, "x")
    assert not theirs.exists()


def test_one_that_vanishes_while_it_is_taken_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last holder may remove it between the opening of the lock's file and the lock."""
    first = hold(tmp_path, "x-shared")
    flock = scratch.fcntl.flock

    def release_then_lock(file: int, how: int) -> None:
        monkeypatch.setattr(scratch.fcntl, "flock", flock)
        first.release()
        flock(file, how)

    monkeypatch.setattr(scratch.fcntl, "flock", release_then_lock)
    with hold(tmp_path, "x-shared") as second:
        (second.path / "content").touch()
    assert list(tmp_path.iterdir()) == []


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x-shared").mkdir()
    me = os.getuid()
    monkeypatch.setattr(scratch.os, "getuid", lambda: me + 1)
    with pytest.raises(PermissionError, match="another user's"):
        hold(tmp_path, "x-shared")
    sweep(tmp_path, "x")
    assert (tmp_path / "x-shared").is_dir()


def test_a_new_folder_that_is_swept_before_it_is_locked_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when all ranks of a node save at once: others sweep, and make a folder of the same name, just before."""
    flock, others = fcntl.flock, list[scratch.Scratch]()

    def late(lock: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH and not others:
            monkeypatch.setattr(fcntl, "flock", flock)
            sweep(tmp_path, "x")
            others.append(hold_new(tmp_path, "x"))
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with hold_new(tmp_path, "x") as mine:
        assert mine.path != others[0].path
        others[0].release()
        assert list(tmp_path.iterdir()) == [mine.path]
    assert not list(tmp_path.iterdir())
