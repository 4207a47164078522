"""The lock on a run folder: only one `train`, torchrun or `launch` at a time uses it, over all machines.

Two files show who holds the lock. On `.run.lock` the holder has a lock of the file system, if that offers locks; the
system releases it when the process dies for any reason. `.run.owner.json` names the holder, which touches it every few
seconds. It is needed since some file systems have no locks, and on shared folders locks often hold on one machine only.
A holder counts as gone
- at once, if it ran on this machine and its process does not exist any more;
- after `PATIENCE_SECONDS` without a sign of life, if it ran on another machine and does not hold the lock.
A holder that was paused for so long, and finds that another process has taken over, ends at once with its ranks, since
otherwise two processes would write the same run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

from megatron_deepstack.errors import RunFolderError
from megatron_deepstack.platform.files.run_disk import said_by, writing
from megatron_deepstack.platform.files.write_whole import create_whole, write_whole
from megatron_deepstack.platform.processes.owner import (
    BEAT_SECONDS,
    PATIENCE_SECONDS,
    Owner,
    is_here,
    lives,
    owner_in,
    this_process,
)

LOCK_FILE: Final = ".run.lock"
OWNER_FILE: Final = ".run.owner.json"
HELD: Final = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""Error numbers of a file system on which another process holds the lock."""
NO_LOCKS: Final = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""Error numbers of a file system that offers no locks, or whose lock service cannot be reached."""


@contextmanager
def run_lock(run_dir: Path, what: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock on a run folder for a block. The process that starts the ranks calls it, or rank 0.

    Args:
        run_dir: The run folder; it is made if it does not exist.
        what: What this process is: `train`, `torchrun` or `launch`.
        tell: Function that shows a message to the user, if it is necessary to wait.

    Yields:
        Nothing; the lock is held in the block.

    Raises:
        RunFolderError: Another process, which the message names, holds the lock; or the folder cannot be written.
    """
    with writing(run_dir / OWNER_FILE):
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        owner = _acquire(run_dir, handle, what, tell)
        heart = _Heart(run_dir, owner)
        try:
            yield
        finally:
            heart.stop()
            _give_back(run_dir, owner)
    finally:
        os.close(handle)


def _acquire(run_dir: Path, handle: int, what: str, tell: Callable[[str], None]) -> Owner:
    file, me = run_dir / OWNER_FILE, this_process(what)
    locked = take_lock(handle, run_dir / LOCK_FILE)
    if locked is False:
        raise _taken(run_dir, read_owner(file))
    while True:
        before = _look(file)
        owner = read_owner(file)
        if before is not None and owner is not None:
            if not is_here(owner):
                tell(
                    f"{run_dir}: {_who(owner)} worked here last and did not say that it ended; waiting up to "
                    f"{PATIENCE_SECONDS:.0f} s for a sign of life"
                )
            if lives(owner, before, lambda: _look(file), patience_seconds=PATIENCE_SECONDS, beat_seconds=BEAT_SECONDS):
                raise _taken(run_dir, owner)
        with writing(file):
            if locked:
                write_whole(file, _text(me))
                return me
            if _take_over(file, owner) and _created(file, me):
                return me


def take_lock(handle: int, file: Path) -> bool | None:
    """Take the file system's lock on an open file, without waiting.

    Args:
        handle: File descriptor, open for writing.
        file: Path of the file, for the message.

    Returns:
        True if this process has the lock, False if another process holds it, None if the file system offers no locks.

    Raises:
        RunFolderError: The file system reports another error.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno in NO_LOCKS:
            return None
        raise RunFolderError(
            f"{file}: cannot be locked ({said_by(error)}); look whether its file system is well, or set run_dir to "
            "another one"
        ) from error
    return True


def _take_over(file: Path, judged: Owner | None) -> bool:
    """Remove the record of an owner that is gone; return False if another process was faster."""
    aside = file.with_name(f"{file.name}.{os.uname().nodename}.{os.getpid()}.gone")
    try:
        file.rename(aside)
    except FileNotFoundError:
        return True
    found = read_owner(aside)
    if found is not None and (judged is None or found.token != judged.token):
        with suppress(FileExistsError):
            create_whole(file, _text(found))
        aside.unlink()
        return False
    aside.unlink()
    return True


def _created(file: Path, me: Owner) -> bool:
    try:
        create_whole(file, _text(me))
    except FileExistsError:
        return False
    return True


def _give_back(run_dir: Path, owner: Owner) -> None:
    """Remove this process's record. If the disk refuses, the next process finds that this one does not exist."""
    file = run_dir / OWNER_FILE
    found = read_owner(file)
    if found is not None and found.token == owner.token:
        with suppress(OSError):
            file.unlink()


def read_owner(file: Path) -> Owner | None:
    """Read the owner that a record names.

    Args:
        file: File of the record.

    Returns:
        The owner; None if there is no record, or if it cannot be read.
    """
    try:
        return owner_in(file.read_bytes())
    except OSError:
        return None


def _look(file: Path) -> tuple[str, int] | None:
    """Return content and time of the record, None if there is none.

    The file is opened, since on a shared folder only that asks the server for its present state.
    """
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(), os.fstat(stream.fileno()).st_mtime_ns
    except OSError:
        return None


def _text(owner: Owner) -> str:
    return json.dumps(asdict(owner), allow_nan=False) + "\n"


class _Heart:
    """A thread that touches the owner's record every few seconds, until it is stopped."""

    def __init__(self, run_dir: Path, owner: Owner) -> None:
        self._run_dir, self._owner = run_dir, owner
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for its end."""
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        file = self._run_dir / OWNER_FILE
        while not self._stopped.wait(BEAT_SECONDS):
            found = read_owner(file)
            if found is not None and found.token != self._owner.token:
                _end(self._run_dir, found)
            # A touch takes no space, so a full disk does not make the holder look dead. If the folder cannot be reached
            # for a moment, this beat is left out; the run's own writing reports such an error.
            with suppress(OSError):
                if found is None:
                    create_whole(file, _text(self._owner))
                else:
                    os.utime(file)


def _end(run_dir: Path, other: Owner) -> None:
    """End this process and the ranks that it has started, since another process uses the run folder."""
    sys.stderr.write(
        f"error: {run_dir}: {_who(other)} has taken over this run, since this process stood still for more than "
        f"{PATIENCE_SECONDS:.0f} s. This process ends, so that two do not write one run; the other goes on from the "
        "newest checkpoint\n"
    )
    sys.stderr.flush()
    os._exit(RunFolderError.exit_code)


def _taken(run_dir: Path, owner: Owner | None) -> RunFolderError:
    if owner is None:
        return RunFolderError(
            f"{run_dir}: another process works in this run folder ({LOCK_FILE} is locked, and {OWNER_FILE} does not "
            f"say by whom; `fuser {run_dir / LOCK_FILE}` does on its machine). Wait for it, stop it, or take another "
            "run_dir"
        )
    if owner.what == "launch":
        advice = (
            f"Follow it with `megatron-deepstack status {run_dir}`, end it with `megatron-deepstack stop {run_dir}`, "
            "or take another run_dir"
        )
    else:
        advice = (
            f"Wait for it, stop it with `kill {owner.pid}` on {owner.host} (it saves first), or take another run_dir"
        )
    return RunFolderError(f"{run_dir}: {_who(owner)} trains in this run folder already. {advice}")


def _who(owner: Owner) -> str:
    return f"`{owner.what or 'a run'}` ({owner}, started {owner.since})"
