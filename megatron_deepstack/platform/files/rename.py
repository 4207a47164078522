"""A rename that replaces nothing, which Linux offers and Python does not."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


def rename_new(source: Path, target: Path) -> None:
    """Rename a file, whole and at once; of several that ask for one name one gets it. Raises FileExistsError.

    Raises OSError with EINVAL where the file system knows no such rename.
    """
    library = ctypes.CDLL(None, use_errno=True)
    names = (_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target))
    if not hasattr(library, "renameat2"):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(target))
    if library.renameat2(*names, _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))
