"""Which checkpoints stay: the newest, those at multiples of a step number for good, and no leftovers.

Leftovers are what saves and deletions leave behind that were cut short. They are removed unless a living process is
writing them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_deepstack.checkpoint.folder import REMOVED, checkpoints_folder, looks_whole, remove, step_folders
from megatron_deepstack.errors import CheckpointError, RunFolderError
from megatron_deepstack.platform.files.run_lock import take_lock

LOCK = ".being_written"
"""File in a partial folder that its writer holds locked."""


def superfluous(whole: Sequence[int], committed: int, *, keep: int, keep_every: int) -> list[int]:
    """Steps of the checkpoints that may be deleted after the one of step `committed` was written.

    Checkpoints of later steps than `committed` stay: a run that went back to an older checkpoint does not decide about
    them.

    Args:
        whole: Steps of all whole checkpoints, in any order.
        committed: Step of the checkpoint just written.
        keep: Number of newest checkpoints up to `committed` that stay; 0 keeps all.
        keep_every: Checkpoints at multiples of it stay too; 0 for none.

    Returns:
        The steps, in ascending order.
    """
    done = sorted(step for step in whole if step <= committed)
    old = done[:-keep] if keep else []
    return [step for step in old if not (keep_every and step % keep_every == 0)]


def prune(run_dir: str | Path, committed: int, *, keep: int, keep_every: int) -> list[str]:
    """Delete superfluous checkpoints. Call after a commit: the one of step `committed` is whole.

    Folders that are visibly damaged do not count among the `keep`.

    Args:
        run_dir: The run folder.
        committed: Steps of the checkpoint just written.
        keep: The newest that stay; 0: all.
        keep_every: Those at multiples of it stay too; 0: none.

    Returns:
        A line for the user on each that could not be deleted, since it takes the room that `keep` promises.
    """
    faults = []
    folders = dict(step_folders(run_dir))
    whole = [step for step, path in folders.items() if looks_whole(path)]
    for step in superfluous(whole, committed, keep=keep, keep_every=keep_every):
        try:
            remove(folders[step])
        except OSError as error:
            faults.append(
                f"{folders[step]}: no longer needed (checkpoint.keep {keep}), and could not be deleted ({error}); it "
                "is tried again after the next save"
            )
    return faults


def remove_leftovers(run_dir: str | Path) -> list[Path]:
    """Delete what interrupted saves and deletions left behind, but not what a living process is writing.

    On a file system without locks nothing is being written: the process that trains holds the run folder (`run_lock`).

    Args:
        run_dir: The run folder.

    Returns:
        What was deleted.

    Raises:
        CheckpointError: It cannot be found out whether a process is writing.
    """
    folder = checkpoints_folder(run_dir)
    leftovers = sorted(folder.glob(f"step_*{REMOVED}"))
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(folder.glob("step_*.partial")):
        try:
            lock = FolderLock(path)
        except BeingWritten:
            continue
        except OSError as error:
            raise CheckpointError(f"{path}: what an earlier save left cannot be removed ({error})") from error
        shutil.rmtree(path, ignore_errors=True)
        lock.release()
        leftovers.append(path)
    return leftovers


class BeingWritten(CheckpointError):
    """Another process holds the folder."""


class FolderLock:
    """Held by rank 0 on a partial folder while its save lives; the system lets go of it when the process dies."""

    def __init__(self, partial: Path) -> None:
        """Create the folder if need be and lock it; where the file system offers no locks only the run's own is left.

        Args:
            partial: The folder that a save writes.

        Raises:
            BeingWritten: Another process holds it.
            CheckpointError: The file system's answer is neither a lock, nor that it is held, nor that there are none.
            OSError: The folder cannot be made.
        """
        partial.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(partial / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            taken = take_lock(self._handle, partial / LOCK)
        except RunFolderError as error:
            self.release()
            raise CheckpointError(str(error)) from error
        if taken is False:
            self.release()
            raise BeingWritten(
                f"{partial}: another process is writing this checkpoint; two runs share a run_dir. Stop one of them, "
                "or give it a run_dir of its own"
            )

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
