"""A rename that never replaces an existing file; Linux offers it, but Python's library does not."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


def rename_new(source: Path, target: Path) -> None:
    """Rename a file atomically. If several processes rename to the same name, only one succeeds.

    Args:
        source: The file.
        target: Its new path on the same file system.

    Raises:
        FileExistsError: The target exists.
        OSError: The rename failed; with EINVAL if the system or the file system does not offer such a rename.
    """
    library = ctypes.CDLL(None, use_errno=True)
    names = (_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target))
    if not hasattr(library, "renameat2"):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(target))
    if library.renameat2(*names, _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))
