"""Where an image is, a file of a folder, an object of a bucket or a member of a tar shard; and reading its bytes.

Errors are told apart by whose they are. What belongs to one image (missing, empty, no regular file) quarantines it;
what belongs to the machine or the network (a broken disk, a lost connection) stops the job, which goes on from there
later.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from megatron_deepstack.data.location import Location
from megatron_deepstack.errors import DataError, LocationError

_Result = TypeVar("_Result")

_UNREADABLE: Final = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENAMETOOLONG: "file name too long",
    errno.ELOOP: "symbolic links in a circle",
    errno.EINVAL: "not a valid file name",
}
"""Errors that belong to one path; others (a broken disk, a lost mount) belong to the machine and stop the part."""
_MAX_BYTES_PER_PIXEL: Final = 8
"""16-bit RGBA, the largest uncompressed pixel; a file with more bytes than that per allowed pixel is not read."""
_HEADER_BYTES: Final = 65536
_PAUSES: Final = (1.0, 4.0)
"""Seconds before a request that failed is made again; fsspec's packages retry by themselves before that."""


class QuarantineError(Exception):
    """The image cannot be used; the message is the reason, without its path."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in an uncompressed tar."""

    shard: Location
    first: int
    """Offset of its header, which is one block; the content follows."""
    size: int
    checksum: int
    """Of the header, as tar has it: another file in its place is noticed."""


ImageAt = Location | TarMember
"""Where an image is."""


def is_local(image: ImageAt) -> bool:
    """It is read from a file system, not over a connection of our own."""
    return image.shard.is_local if isinstance(image, TarMember) else image.is_local


def read_image(image: ImageAt, max_pixels: int) -> bytes:
    """Bytes of an image file.

    Raises QuarantineError for what cannot be a usable image (missing, not a regular file, empty, larger than any image
    of `max_pixels`), DataError when machine or network fail to give it.
    """
    if isinstance(image, TarMember):
        return _read_member(image, max_pixels)
    return _read_file(str(image.local_path()), max_pixels) if image.is_local else _read_object(image, max_pixels)


def _read_file(path: str, max_pixels: int) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise QuarantineError("not a regular file")
        _check_size(status.st_size, max_pixels)
        with open(path, "rb") as file:
            return file.read()
    except ValueError as error:
        raise QuarantineError(f"not a valid file name: {error}") from error
    except OSError as error:
        if error.errno in _UNREADABLE:
            raise QuarantineError(_UNREADABLE[error.errno]) from error
        raise _machine_error(path, error) from error


def _read_object(image: Location, max_pixels: int) -> bytes:
    try:
        _check_size(_insist(image.size), max_pixels)
        return _insist(image.read_bytes)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise QuarantineError("no such object") from error
    except OSError as error:  # no permission: the credentials', since a bucket's objects share them
        raise _machine_error(str(image), error) from error


def _read_member(image: TarMember, max_pixels: int) -> bytes:
    """Header and content in one read; the header tells whether the shard is still the one that was planned with."""
    _check_size(image.size, max_pixels)
    shard, length = image.shard, tarfile.BLOCKSIZE + image.size
    try:
        data = _insist(lambda: shard.read_bytes(image.first, length))
        header = tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        if len(data) == length and (header.size, header.chksum) == (image.size, image.checksum):
            return data[tarfile.BLOCKSIZE :]
    except tarfile.TarError:
        pass
    except OSError as error:
        raise _machine_error(str(shard), error) from error
    raise DataError(f"{shard}: has changed since the job began. Preprocess into a new folder.")


def _check_size(size: int, max_pixels: int) -> None:
    if size == 0:
        raise QuarantineError("the file is empty")
    if size > max_pixels * _MAX_BYTES_PER_PIXEL + _HEADER_BYTES:
        raise QuarantineError(f"the file has {size} bytes, too many for {max_pixels} pixels")


def _insist(request: Callable[[], _Result]) -> _Result:
    """A request's result, after further attempts if the connection or the service fails. Raises LocationError."""
    for pause in _PAUSES:
        try:
            return request()
        except LocationError:
            time.sleep(pause)
    return request()


def _machine_error(path: str, error: OSError) -> DataError:
    return DataError(
        f"{path}: reading failed: {error.strerror or error}. This is the machine's or the network's fault, not the "
        "image's; run the same command again when it is mended."
    )
