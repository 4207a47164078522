"""Writing files that other processes may read at any moment: a file has its complete new content, or the old one.

The content is written to a temporary file in the same folder and to the disk, and then that file is renamed. After a
full disk or a kill, the old content is still there. The name of a temporary file contains the id of its process.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from megatron_deepstack.platform.files.rename import give_new_name


def write_whole(path: Path, text: str) -> None:
    """Replace the content of a file atomically.

    Args:
        path: The file; its folder exists.
        text: The new content, written as UTF-8.

    Raises:
        OSError: The file cannot be written; it is not changed.
    """
    partial = partial_of(path)
    try:
        write_through(partial, text)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def write_result(path: Path, text: str) -> None:
    """Write a result to the path that a user named: a file keeps its old content until the new one is complete.

    Args:
        path: The file. Behind a symbolic link, the file that it leads to is replaced; a device or a pipe is written to.
        text: The new content, written as UTF-8.

    Raises:
        OSError: It cannot be written; a file is not changed.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        write_whole(Path(os.path.realpath(path)), text)


def create_whole(path: Path, text: str) -> None:
    """Create a file with its content atomically. If several processes create it, only one succeeds.

    Args:
        path: The file; its folder exists.
        text: The content, written as UTF-8.

    Raises:
        FileExistsError: The file exists.
        OSError: The file cannot be written, or `give_new_name` finds no way on its file system.
    """
    partial = partial_of(path)
    try:
        write_through(partial, text)
        give_new_name(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def partial_of(path: Path) -> Path:
    """Return the temporary file for the content of a file, which no other process uses.

    Args:
        path: The file.

    Returns:
        A path in the same folder, with the names of this host and process in it.
    """
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.partial")


def write_through(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk. Another process may see a part of it meanwhile.

    Args:
        path: The file; its folder exists.
        text: The content, written as UTF-8.

    Raises:
        OSError: The file cannot be written.
    """
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
