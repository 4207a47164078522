"""Where an image is (a file in a folder, an object in a bucket, a member of a tar shard), and how its bytes are read.

There are two kinds of errors. An error of one image (missing, empty, not a regular file) puts that image into
quarantine. An error of the machine or the network (a broken disk, a lost connection) stops the job; the same command
continues it later.
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
"""Errors that belong to one path; others (a broken disk, a lost mount) come from the machine and stop the part."""
_MAX_BYTES_PER_PIXEL: Final = 8
"""The largest uncompressed pixel is 16-bit RGBA; a file with more bytes than this per allowed pixel is not read."""
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
    """tar's own checksum of the header; it shows when another file has taken the member's place."""


FileAt = Location | TarMember
"""Where a file is."""


@dataclass(frozen=True, slots=True)
class FramesAt:
    """Where a pair of a video's frames is."""

    files: tuple[FileAt, ...]
    """The video file, or the two image files."""
    numbers: tuple[int, int] | None
    """Numbers of the frames in a video file; None for image files."""
    size: tuple[int, int]
    """Width and height of the view in pixels."""
    fault: str | None = None
    """Why the video cannot be used, if it cannot."""


ImageAt = FileAt | FramesAt
"""Where an image is."""


def files_of(image: ImageAt) -> tuple[FileAt, ...]:
    """The files that an image is made from: one, or those of a pair of frames."""
    return image.files if isinstance(image, FramesAt) else (image,)


def is_local(image: ImageAt) -> bool:
    """Whether the image is read from a file system, and not over a connection of our own."""
    return all(one.shard.is_local if isinstance(one, TarMember) else one.is_local for one in files_of(image))


def read_image(image: FileAt, max_pixels: int) -> bytes:
    """Read the bytes of an image file.

    Args:
        image: Where it is.
        max_pixels: A file that is larger than any image of so many pixels is refused unread.

    Returns:
        The bytes.

    Raises:
        QuarantineError: It cannot be a usable image (missing, not a regular file, empty, too large).
        DataError: The machine or the network failed to give it.
    """
    if isinstance(image, TarMember):
        return _read_member(image, max_pixels)
    return _read_file(str(image.local_path()), max_pixels) if image.is_local else _read_object(image, max_pixels)


def _read_file(path: str, max_pixels: int) -> bytes:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise QuarantineError("a folder, not a file")
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
    except OSError as error:  # a missing permission is no fault of the image: all objects share the credentials
        raise _machine_error(str(image), error) from error


def _read_member(image: TarMember, max_pixels: int) -> bytes:
    """Read header and content together; the header shows whether the shard is still the one that was planned with."""
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
    """The result of a request, repeated if the connection or the service fails. Raises LocationError."""
    for pause in _PAUSES:
        try:
            return request()
        except LocationError:
            time.sleep(pause)
    return request()


def _machine_error(path: str, error: OSError) -> DataError:
    return DataError(
        f"{path}: reading failed: {error.strerror or error}. This is the machine's or the network's fault, not the "
        "image's; run the same command again when it is repaired."
    )
