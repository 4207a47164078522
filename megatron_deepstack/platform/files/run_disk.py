"""Tests before ranks start that the run folder can be written and has room, and errors of one line if not.

`writing` encloses everything that the run writes into its folder, so that a disk that becomes full later also gives an
error of one line.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from megatron_deepstack.errors import RunFolderError
from megatron_deepstack.platform.files.write_whole import write_through

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_GIB: Final = 1 << 30


def require_writable(run_dir: Path) -> None:
    """Make the run folder if it does not exist, and test it by writing a small file.

    Args:
        run_dir: The recipe's `run_dir`.

    Raises:
        RunFolderError: It is a file, is read-only, is full, or belongs to another user.
    """
    probe = run_dir / f".writable.{os.uname().nodename}.{os.getpid()}"
    try:
        try:
            write_probe(probe, "this folder can be written\n")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"run_dir: {run_dir} cannot be written ({said_by(error)}); expected a folder that can be made or written "
            f"here. {_advice(error)}"
        ) from error


def write_probe(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk; its folder is made if it does not exist.

    Args:
        path: The file.
        text: Its content.

    Raises:
        OSError: The folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_through(path, text)


def require_room(run_dir: Path, needed_bytes: int, what: str) -> None:
    """Test that the file system of the run folder has enough free space.

    Args:
        run_dir: The recipe's `run_dir`, which exists.
        needed_bytes: Bytes that the run is going to write.
        what: What needs the space, for the message.

    Raises:
        RunFolderError: There is less free space.
    """
    free_bytes = shutil.disk_usage(run_dir).free
    if free_bytes < needed_bytes:
        raise RunFolderError(
            f"run_dir: {run_dir} has {size_text(free_bytes)} free; expected {size_text(needed_bytes)} for {what}. "
            "Make room, keep fewer (checkpoint.keep), or set run_dir to a larger disk"
        )


def size_text(num_bytes: int) -> str:
    """Write a number of bytes for people.

    Args:
        num_bytes: The number.

    Returns:
        The number in GiB, or in MiB below a tenth of a GiB, with its unit.
    """
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB / 10 else f"{num_bytes / (1 << 20):.1f} MiB"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into an error of one line.

    Args:
        path: What the block writes in the run folder, for the message.

    Yields:
        Nothing.

    Raises:
        RunFolderError: The block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be written ({said_by(error)}). {_advice(error)} and run the same command again: it goes "
            "on from the newest checkpoint"
        ) from error


def said_by(error: OSError) -> str:
    """Return the system's message of an error, with the file that it concerns.

    Args:
        error: The error that the system raised.

    Returns:
        A text such as `No space left on device: 'runs/a/metrics.jsonl'`.
    """
    words = error.strerror or str(error) or type(error).__name__
    return f"{words}: {str(error.filename)!r}" if error.filename else words


def _advice(error: OSError) -> str:
    if error.errno in _FULL:
        return "Make room on that disk, raise its quota, or set run_dir to another one"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return "Remove the file that is in the way, or set run_dir to a folder"
    if error.errno == errno.EROFS:
        return "Mount that file system for writing, or set run_dir to another one"
    return "Change its permissions, or set run_dir to a folder that you may write"
