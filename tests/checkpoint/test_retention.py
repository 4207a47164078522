"""Which checkpoints stay, and what becomes of saves that were cut short."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_deepstack.checkpoint import verification
from megatron_deepstack.checkpoint.folder import (
    Checkpoint,
    Manifest,
    checkpoint_path,
    fingerprint,
    newest_whole,
    partial_path,
    step_folders,
    verify_content,
    write_manifest,
)
from megatron_deepstack.checkpoint.saving.retention import FolderLock, prune, remove_leftovers, superfluous
from megatron_deepstack.checkpoint.verification import remove_leftovers_together
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.platform.files.run_lock import NO_LOCKS
from megatron_deepstack.testing.ranks import RankPool

Pools = Callable[[int], RankPool]


@pytest.mark.parametrize(
    ("whole", "committed", "keep", "keep_every", "expected"),
    [
        ([2, 4, 6, 8], 8, 2, 0, [2, 4]),
        ([2, 4, 6, 8], 8, 0, 0, []),
        ([2, 4, 6, 8], 8, 1, 4, [2, 6]),
        ([2, 4, 6, 8], 8, 1, 3, [2, 4]),
        ([8], 8, 1, 0, []),
        ([2, 3, 8, 9], 3, 1, 0, [2]),
        ([2], 2, 5, 0, []),
        ([], 2, 1, 0, []),
    ],
    ids=["newest", "all", "newest-and-fourth", "third", "the-only-one", "went-back", "fewer", "none"],
)
def test_superfluous(whole: list[int], committed: int, keep: int, keep_every: int, expected: list[int]) -> None:
    assert superfluous(whole, committed, keep=keep, keep_every=keep_every) == expected


def make(run_dir: Path, step: int) -> Path:
    """A whole checkpoint of one file."""
    path = checkpoint_path(run_dir, step)
    path.mkdir(parents=True)
    (path / "data").write_bytes(b"content of step %d" % step)
    write_manifest(path, Manifest(step=step, facts={}, files={"data": fingerprint(path / "data")}))
    return path


def steps_left(run_dir: Path) -> list[int]:
    return [step for step, _ in step_folders(run_dir)]


def test_a_damaged_one_does_not_count(tmp_path: Path) -> None:
    """Of `keep: 2` both are whole, although a newer folder is in the way."""
    for step in (2, 4, 6):
        make(tmp_path, step)
    (checkpoint_path(tmp_path, 4) / "data").write_bytes(b"short")
    prune(tmp_path, 6, keep=2, keep_every=0)
    assert steps_left(tmp_path) == [2, 4, 6]
    make(tmp_path, 8)
    prune(tmp_path, 8, keep=2, keep_every=0)
    assert steps_left(tmp_path) == [4, 6, 8]
    checkpoint, _ = newest_whole(tmp_path)
    assert checkpoint is not None
    assert checkpoint.manifest.step == 8


def test_the_one_just_written_stays_beside_damaged_newer_ones(tmp_path: Path) -> None:
    """A run that resumed from step 2, because 9 is damaged, and saved step 3."""
    for step in (2, 3, 9):
        make(tmp_path, step)
    (checkpoint_path(tmp_path, 9) / "manifest.json").unlink()
    prune(tmp_path, 3, keep=1, keep_every=0)
    assert steps_left(tmp_path) == [3, 9]


def test_leftovers_go_but_not_a_living_writers(tmp_path: Path) -> None:
    dead, living = (partial_path(checkpoint_path(tmp_path, step)) for step in (2, 4))
    for path in (dead, living):
        path.mkdir(parents=True)
        (path / "__0_0.distcp").write_bytes(b"half")
    lock = FolderLock(living)
    assert remove_leftovers(tmp_path) == [dead]
    assert living.exists()
    with pytest.raises(CheckpointError, match="two runs share a run_dir"):
        FolderLock(living)
    lock.release()
    assert remove_leftovers(tmp_path) == [living]
    assert newest_whole(tmp_path) == (None, [])


def test_a_deletion_that_is_cut_short_leaves_a_leftover_and_no_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4):
        make(tmp_path, step)

    def killed(path: Path, ignore_errors: bool = False) -> None:
        (path / "data").unlink(missing_ok=True)

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", killed)
        prune(tmp_path, 4, keep=1, keep_every=0)
    assert steps_left(tmp_path) == [4]
    (left,) = remove_leftovers(tmp_path)
    assert left.name == "step_00000002.removed"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]


def newest_while_deleted(rank: int, run_dir: str, times: int) -> int | str:
    """On a rank: the newest checkpoint, while a run replaces it that many times by the next one."""
    saved = 2

    def read(checkpoint: Checkpoint, name: str) -> None:
        nonlocal saved
        if saved < 2 + times:
            saved += 1
            make(Path(run_dir), saved)
            prune(run_dir, saved, keep=1, keep_every=0)
        verify_content(checkpoint, name)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verification, "verify_content", read)
        try:
            found, _ = verification.newest_whole_together(run_dir)
        except CheckpointError as error:
            return str(error)
    assert found is not None
    return found.manifest.step


def test_a_checkpoint_that_is_deleted_while_it_is_read(tmp_path: Path, ranks: Pools) -> None:
    """A run that trains keeps its newest ones alone: there is a newer one then, and nothing is damaged."""
    make(tmp_path / "run", 2)
    assert ranks(2).run(newest_while_deleted, str(tmp_path / "run"), 2) == [4, 4]
    make(tmp_path / "quick", 2)
    said = ranks(2).run(newest_while_deleted, str(tmp_path / "quick"), 100)[0]
    assert "its checkpoints were deleted while they were read, 5 times" in said
    assert "remove the folder" not in said


def flock_answers(patched: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    patched.setattr("fcntl.flock", refuse)


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_without_locks_the_runs_own_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Who trains holds the run folder by a record there; saves and their leftovers need no other lock."""
    flock_answers(monkeypatch, number)
    partial = partial_path(checkpoint_path(tmp_path, 2))
    FolderLock(partial).release()
    assert remove_leftovers(tmp_path) == [partial]


def test_other_answers_are_told_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock_answers(monkeypatch, errno.EIO)
    handles = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=r"cannot be locked \(Input/output error.*set run_dir to another one"):
        FolderLock(partial_path(checkpoint_path(tmp_path, 2)))
    assert len(os.listdir("/proc/self/fd")) == handles


def test_a_checkpoint_that_cannot_be_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (2, 4):
        make(tmp_path, step)

    def refuse(path: Path, target: Path) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    (fault,) = prune(tmp_path, 4, keep=1, keep_every=0)
    assert "step_00000002: no longer needed (checkpoint.keep 1), and could not be deleted" in fault
    assert "Permission denied" in fault
    assert "tried again after the next save" in fault


def leftovers_without_locks(rank: int, run_dir: Path) -> str:
    with pytest.MonkeyPatch.context() as patched:
        if rank == 0:
            flock_answers(patched, errno.EIO)
        try:
            remove_leftovers_together(run_dir)
        except CheckpointError as error:
            return str(error)
    return ""


def test_every_rank_hears_of_leftovers_that_cannot_be_removed(ranks: Pools, tmp_path: Path) -> None:
    partial_path(checkpoint_path(tmp_path, 2)).mkdir(parents=True)
    first, second = ranks(2).run(leftovers_without_locks, tmp_path)
    assert first == second
    assert "cannot be locked" in first
