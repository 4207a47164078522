"""Files that others read at any moment: they get their content at once, or keep what they had.

The content goes into a second file beside the first and to the disk, and then takes the name. A full disk or a kill
leaves the old content; what is left of the second file bears the name of its process.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from megatron_deepstack.platform.files.rename import rename_new

_NOT_OFFERED: Final = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)
"""What file systems answer that have no hard links, or no rename that replaces nothing."""


def write_whole(path: Path, text: str) -> None:
    """Give a file its content at once, in place of what it had.

    Args:
        path: The file; its folder is there.
        text: The content, written as UTF-8.

    Raises:
        OSError: The disk refuses; the file is as it was.
    """
    partial = partial_of(path)
    try:
        _write(partial, text)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def create_whole(path: Path, text: str) -> None:
    """Create a file with its content at once; of several that create it at a time one does.

    Args:
        path: The file; its folder is there.
        text: The content, written as UTF-8.

    Raises:
        FileExistsError: The file is there.
        OSError: The disk refuses, or offers neither hard links nor a rename that replaces nothing.
    """
    partial = partial_of(path)
    try:
        _write(partial, text)
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise
            rename_new(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def partial_of(path: Path) -> Path:
    """Where a file's content lies before it has its name; of this process and host alone.

    Args:
        path: The file.

    Returns:
        A path in the same folder.
    """
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.partial")


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
