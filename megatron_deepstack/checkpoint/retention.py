"""Which checkpoints stay: the newest, every so-manyth for good, and nothing of saves that were cut short."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_deepstack.checkpoint.folder import checkpoints_folder, looks_whole, step_folders
from megatron_deepstack.errors import CheckpointError

LOCK = ".being_written"
"""File in a partial folder that its writer holds locked."""


def superfluous(whole: Sequence[int], committed: int, *, keep: int, keep_every: int) -> list[int]:
    """Steps of `whole` checkpoints that may go after that of step `committed` was written.

    The newest `keep` up to `committed` stay (0 keeps all), and multiples of `keep_every` (0 for none). So does whatever
    lies beyond `committed`: a run that went back to an older checkpoint does not decide about those.
    """
    done = sorted(step for step in whole if step <= committed)
    old = done[:-keep] if keep else []
    return [step for step in old if not (keep_every and step % keep_every == 0)]


def prune(run_dir: str | Path, committed: int, *, keep: int, keep_every: int) -> None:
    """Delete superfluous checkpoints. Call after a commit: the one of step `committed` is whole.

    Folders that are visibly damaged do not count among the `keep`.
    """
    folders = dict(step_folders(run_dir))
    whole = [step for step, path in folders.items() if looks_whole(path)]
    for step in superfluous(whole, committed, keep=keep, keep_every=keep_every):
        shutil.rmtree(folders[step], ignore_errors=True)


def remove_leftovers(run_dir: str | Path) -> list[Path]:
    """Delete what interrupted saves left behind, but not what a living process is writing; returns what was deleted."""
    removed = []
    for path in sorted(checkpoints_folder(run_dir).glob("step_*.partial")):
        try:
            lock = FolderLock(path)
        except CheckpointError:
            continue
        shutil.rmtree(path, ignore_errors=True)
        lock.release()
        removed.append(path)
    return removed


class FolderLock:
    """Held by rank 0 on a partial folder while its save lives; the system lets go of it when the process dies."""

    def __init__(self, partial: Path) -> None:
        """Create the folder if need be and lock it. Raises CheckpointError if another process holds it."""
        partial.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(partial / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise CheckpointError(
                f"{partial}: another process is writing this checkpoint; two runs share a run_dir. Stop one of them, "
                "or give it a run_dir of its own"
            ) from None

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
