"""Which checkpoints stay: the newest, every so-manyth for good, and nothing of saves and deletions cut short."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_deepstack.checkpoint.folder import REMOVED, checkpoints_folder, looks_whole, remove, step_folders
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
        with suppress(OSError):  # what cannot go now is tried again after the next save
            remove(folders[step])


def remove_leftovers(run_dir: str | Path) -> list[Path]:
    """Delete what interrupted saves and deletions left behind, but not what a living process is writing.

    Returns what was deleted. Raises CheckpointError where it cannot be found out whether a process is writing.
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
        """Create the folder if need be and lock it.

        Raises BeingWritten if another process holds it, CheckpointError if the file system has no locks, and OSError.
        """
        partial.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(partial / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise BeingWritten(
                f"{partial}: another process is writing this checkpoint; two runs share a run_dir. Stop one of them, "
                "or give it a run_dir of its own"
            ) from None
        except OSError as error:
            self.release()
            raise CheckpointError(
                f"{partial}: this folder cannot be locked ({error}), so two runs could write one checkpoint. Mount its "
                "file system with locks (NFS without `nolock`, Lustre with `flock`), or set run_dir to another one"
            ) from error

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
