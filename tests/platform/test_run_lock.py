"""One process at a time works in a run folder: who is refused, who may take over, and on which file systems."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from megatron_deepstack.errors import RunFolderError
from megatron_deepstack.platform.files import run_lock as module
from megatron_deepstack.platform.files.run_lock import LOCK_FILE, NO_LOCKS, OWNER_FILE, read_owner, run_lock
from megatron_deepstack.platform.processes.owner import Owner, this_process

HOLD = """
import sys, time
from pathlib import Path
from megatron_deepstack.platform.files import run_lock
run_lock.BEAT_SECONDS = float(sys.argv[3])
with run_lock.run_lock(Path(sys.argv[1]), sys.argv[2], print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)


def flock_answers(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)


def leave_record(run_dir: Path, **changes: Any) -> Owner:
    """What a holder left that did not end well."""
    run_dir.mkdir(exist_ok=True)
    owner = replace(this_process("train"), **changes)
    (run_dir / OWNER_FILE).write_text(json.dumps(asdict(owner)))
    return owner


def hold(run_dir: Path, what: str, beat_seconds: float = 5.0) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(run_dir), what, str(beat_seconds)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


ADVICE = {
    "train": r"stop it with `kill PID` on HOST",
    "torchrun": r"stop it with `kill PID` on HOST",
    "launch": r"`megatron-deepstack status .*`megatron-deepstack stop ",
}


@pytest.mark.parametrize("what", ADVICE)
def test_a_second_one_is_refused_and_told_who_holds_it_until_that_one_is_killed(
    tmp_path: Path, told: list[str], what: str
) -> None:
    run_dir = tmp_path / "run"
    holder = hold(run_dir, what)
    try:
        with pytest.raises(RunFolderError) as caught, run_lock(run_dir, "train", told.append):
            pass
        owner = read_owner(run_dir / OWNER_FILE)
        assert owner is not None
        message = str(caught.value)
        assert f"`{what}` (process {holder.pid} on {os.uname().nodename}, started {owner.since}) trains in" in message
        assert re.search(ADVICE[what].replace("PID", str(holder.pid)).replace("HOST", os.uname().nodename), message)
        assert "take another run_dir" in message
    finally:
        holder.kill()
        holder.communicate()
    assert (run_dir / OWNER_FILE).exists(), "the killed one could not clean up"
    with run_lock(run_dir, "launch", told.append):
        owner = read_owner(run_dir / OWNER_FILE)
        assert owner is not None
        assert (owner.pid, owner.what) == (os.getpid(), "launch")
    assert not (run_dir / OWNER_FILE).exists()
    assert told == []


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_without_locks_the_record_alone_says_who_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str], number: int
) -> None:
    flock_answers(monkeypatch, number)
    with run_lock(tmp_path, "train", told.append):
        words = f"process {os.getpid()} on .* trains in this run folder already"
        with pytest.raises(RunFolderError, match=words), run_lock(tmp_path, "launch", told.append):
            pass
    gone = subprocess.Popen(["true"])
    gone.wait()
    leave_record(tmp_path, pid=gone.pid)
    with run_lock(tmp_path, "train", told.append):
        pass
    leave_record(tmp_path, ticks=0)  # another process has its number by now
    with run_lock(tmp_path, "train", told.append):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("locks", [True, False], ids=["locks that end at the machine", "no locks"])
def test_a_holder_on_another_machine_lives_while_its_record_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str], locks: bool
) -> None:
    if not locks:
        flock_answers(monkeypatch, errno.ENOLCK)
    owner = leave_record(tmp_path, host="elsewhere", machine="elsewhere", pid=7)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.01):
            os.utime(tmp_path / OWNER_FILE)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with (
            pytest.raises(RunFolderError, match="process 7 on elsewhere, started"),
            run_lock(tmp_path, "train", told.append),
        ):
            pass
    finally:
        ended.set()
        heart.join()
    assert "did not say that it ended; waiting up to" in told[0]
    assert read_owner(tmp_path / OWNER_FILE) == owner
    with run_lock(tmp_path, "train", told.append):
        found = read_owner(tmp_path / OWNER_FILE)
        assert found is not None
        assert found.pid == os.getpid()


def test_a_record_of_a_later_release_is_read(tmp_path: Path) -> None:
    owner = leave_record(tmp_path)
    (tmp_path / OWNER_FILE).write_text(json.dumps({**asdict(owner), "since_then": 1}))
    assert read_owner(tmp_path / OWNER_FILE) == owner
    for strange in ("", "{}", "[]", "1", '"host"', '{"host": "a"}'):
        (tmp_path / OWNER_FILE).write_text(strange)
        assert read_owner(tmp_path / OWNER_FILE) is None


@pytest.mark.usefixtures("fast")
def test_of_two_that_take_over_at_a_time_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    """Without locks: between judging a dead holder and taking its record away, another process has taken over."""
    flock_answers(monkeypatch, errno.ENOTSUP)
    leave_record(tmp_path, ticks=0)
    take_over = module._take_over

    def slower(file: Path, judged: Owner | None) -> bool:
        if judged is not None and judged.ticks == 0:
            leave_record(tmp_path, token="the faster one")
        return take_over(file, judged)

    monkeypatch.setattr(module, "_take_over", slower)
    with (
        pytest.raises(RunFolderError, match="trains in this run folder already"),
        run_lock(tmp_path, "train", told.append),
    ):
        pass
    found = read_owner(tmp_path / OWNER_FILE)
    assert found is not None
    assert found.token == "the faster one"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_other_answers_of_the_file_system_are_told_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str], number: int
) -> None:
    flock_answers(monkeypatch, number)
    with (
        pytest.raises(RunFolderError, match=rf"\.run\.lock: cannot be locked \({os.strerror(number)}"),
        run_lock(tmp_path, "train", told.append),
    ):
        pass


def test_a_lock_without_a_record(tmp_path: Path, told: list[str]) -> None:
    holder = hold(tmp_path, "train")
    try:
        (tmp_path / OWNER_FILE).unlink()
        with (
            pytest.raises(RunFolderError, match=r"another process works in this run folder.*fuser"),
            run_lock(tmp_path, "train", told.append),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()


def test_a_holder_that_was_taken_over_ends(tmp_path: Path) -> None:
    """It stood still for long, and another machine has judged it gone: two must not write one run."""
    holder = hold(tmp_path, "train", beat_seconds=0.02)
    leave_record(tmp_path, host="elsewhere", pid=7, token="another")
    assert holder.wait(200) == RunFolderError.exit_code
    _, said = holder.communicate()
    assert "`train` (process 7 on elsewhere" in said
    assert "has taken over this run" in said


def test_signs_of_life_need_no_room_and_a_lost_record_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    file = tmp_path / OWNER_FILE
    with run_lock(tmp_path, "train", told.append):
        os.utime(file, ns=(0, 0))
        wait_until(lambda: file.stat().st_mtime_ns > 0)
        file.unlink()
        wait_until(file.exists)


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_a_run_folder_that_cannot_be_made(tmp_path: Path, told: list[str], kind: str) -> None:
    (tmp_path / "run").write_text("")
    run_dir = tmp_path / "run" if kind == "file" else tmp_path / "run" / "below"
    with pytest.raises(RunFolderError, match="cannot be written"), run_lock(run_dir, "train", told.append):
        pass
