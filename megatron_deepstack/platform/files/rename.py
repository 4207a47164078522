"""Final names of files that were written under temporary ones: given once, never to two files, and kept by the disk."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Final

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_NOT_OFFERED: Final = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
"""Errors of file systems that lack hard links, or a rename that replaces nothing, or folders that can be synced."""
_NO_WAY: Final = (
    "this file system has neither hard links nor a rename that replaces nothing, so of several writers none could be "
    "told that another was first. Take a folder on another one (ext4, XFS, NFS and Lustre have both or one), and copy "
    "what is finished"
)


def give_new_name(temporary: Path, path: Path) -> None:
    """Give a whole file its name, which must not exist yet. If several processes do so, only one succeeds.

    It uses a hard link, which every version of NFS has. exFAT and some FUSE mounts have none, but most of them have a
    rename that replaces nothing. Opening the name exclusively and writing there is not enough: a killed process would
    leave a torn file. An NFS client that gets no answer sends its request again, and is then told that the name exists
    although it is of this very file; so that is looked at.

    Args:
        temporary: The file. After a hard link it also keeps this name, which the caller removes.
        path: Its new name on the same file system.

    Raises:
        FileExistsError: The name is another file's.
        OSError: The name cannot be given; with ENOTSUP if the file system offers neither way.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        if not _is_one_file(temporary, path):
            raise
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
        _rename_or_explain(temporary, path)


def _rename_or_explain(temporary: Path, path: Path) -> None:
    try:
        rename_new(temporary, path)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
        raise OSError(errno.ENOTSUP, _NO_WAY, str(path)) from error


def _is_one_file(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except OSError:
        return False


def rename_new(source: Path, target: Path) -> None:
    """Rename a file atomically. If several processes rename to the same name, only one succeeds.

    Linux offers such a rename, but Python's library does not.

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


def sync(path: Path) -> None:
    """Bring the content of a file, or the names in a folder, to the disk.

    Some file systems (9p, shared folders of virtual machines) cannot be asked to for folders. They are passed over:
    what was renamed there is seen by all, and only a crash of the machine right after it could undo it.

    Args:
        path: The file or folder.

    Raises:
        OSError: The disk refuses.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_OFFERED or not path.is_dir():
            raise
    finally:
        os.close(handle)
