"""Scratch folders: private folders on this machine that are removed when no process holds them any more.

Each holder keeps a shared lock on a file in the folder. The kernel releases the lock of a process that is killed, so a
folder whose lock is free is a leftover. The last holder removes its folder, and a process that makes a new folder first
removes the leftovers beside it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

MEMORY: Final = Path("/dev/shm")
"""Folder whose files are kept in memory, on systems that offer it."""
_LOCK: Final = ".held"
_PROBE_BYTES: Final = 1 << 16
NUMBER_DIGITS: Final = 3
"""Largest number of digits of the number in the name of a new folder."""


class Scratch:
    """A scratch folder that this process holds. A context manager; `release` may be called more than once."""

    def __init__(self, folder: Path, lock: int) -> None:
        """Use `hold` or `hold_new` instead. `lock` is the descriptor of the file in the folder that is locked."""
        self.path, self._lock = folder, lock
        self.kept = False
        """Set it to True to keep the folder at the end, so that somebody can read it."""

    def __enter__(self) -> Scratch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Stop holding the folder; the last holder removes it."""
        if self._lock < 0:
            return
        try:
            if not self.kept and _lock_alone(self._lock):
                shutil.rmtree(self.path, ignore_errors=True)
        finally:
            with suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)  # also for processes that were forked since
            os.close(self._lock)
            self._lock = -1


def hold(parent: Path, name: str) -> Scratch:
    """Hold a folder with a known name, which is made if it does not exist. Several processes may hold it.

    Args:
        parent: An existing folder, such as `MEMORY` or the system's temporary folder.
        name: Name of the folder, the same in all processes that share it: its kind, a dash, and a distinct part.

    Returns:
        The held folder. Only this user can read it.

    Raises:
        OSError: It cannot be made, or belongs to another user.
    """
    folder = parent / name
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} is another user's")
        if (held := _held(folder)) is not None:
            return held


def _held(folder: Path) -> Scratch | None:
    """The folder with its lock; None if somebody has removed it at this moment."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if _is_at(lock, folder / _LOCK):
            return Scratch(folder, lock)
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def hold_new(parent: Path, kind: str) -> Scratch:
    """Hold a new folder that no other process knows. Leftovers of its kind beside it are removed first.

    Args:
        parent: An existing folder.
        kind: What the folder is for, in one short word. The name of the folder is the kind, a dash and a number.

    Returns:
        The held folder.

    Raises:
        OSError: It cannot be made or written, for example because the disk is full.
    """
    sweep(parent, kind)
    held = None
    while held is None:  # it may be swept before it is locked, and the next one of its name is somebody else's
        held = _held(parent / _make_new(parent, kind))
    try:
        probe = held.path / ".probe"
        probe.write_bytes(bytes(_PROBE_BYTES))
        probe.unlink()
    except OSError:
        held.release()
        raise
    return held


def places() -> Iterator[Path]:
    """List the folders of this machine that scratch folders may be in: its memory, then its temporary folder."""
    yield MEMORY
    with suppress(OSError):
        yield Path(tempfile.gettempdir())


def hold_new_here(kind: str) -> Scratch:
    """Hold a new folder in the first of `places` that takes one.

    Args:
        kind: As for `hold_new`.

    Returns:
        The held folder.

    Raises:
        OSError: None of them does; it says what is wrong with each.
    """
    faults = []
    for parent in places():
        try:
            return hold_new(parent, kind)
        except OSError as error:
            faults.append(f"{parent}: {error.strerror or error}")
    raise OSError("; ".join(faults))


def sweep(parent: Path, kind: str) -> None:
    """Remove this user's folders of a kind that no process holds. A folder that cannot be removed is left there.

    Args:
        parent: The folder that contains them.
        kind: Their kind, as given to `hold_new`.
    """
    with suppress(OSError):
        for folder in _of_kind(parent, kind):
            with suppress(OSError):
                lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
                try:
                    if _lock_alone(lock) and _is_at(lock, folder / _LOCK):
                        shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(lock)


def _make_new(parent: Path, kind: str) -> str:
    """Make a new folder and return its name, which is short since the paths of sockets must be short."""
    for number in range(10**NUMBER_DIGITS):
        with suppress(FileExistsError):
            (parent / f"{kind}-{number}").mkdir(mode=0o700)
            return f"{kind}-{number}"
    raise FileExistsError(errno.EEXIST, f"{parent} holds {10**NUMBER_DIGITS} folders {kind}-*")


def _of_kind(parent: Path, kind: str) -> Iterable[Path]:
    return [path for path in parent.glob(f"{kind}-*") if path.is_dir() and path.stat().st_uid == os.getuid()]


def _lock_alone(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_at(lock: int, path: Path) -> bool:
    """Whether an open file is still the file at its path, and was not removed since it was opened."""
    try:
        there = path.stat()
    except OSError:
        return False
    held = os.fstat(lock)
    return (held.st_ino, held.st_dev) == (there.st_ino, there.st_dev)
