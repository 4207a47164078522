"""Where files are: a local path, or a URL of an object store. One value stands for both, and is cheap to copy and
pickle.

Local files never go through fsspec, and fsspec is imported for URLs only. A file appears as a whole or not at all: a
local one is written under a temporary name, synced and renamed; a remote one is first written to a local file and then
sent as one object. Credentials and endpoints of a bucket come from the environment (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, ...), as its fsspec package reads them. Errors that belong to one file (missing, forbidden, exists
already) are OSErrors for both kinds; anything else that goes wrong with a URL is a LocationError.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import re
import resource
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from megatron_deepstack.errors import ConfigError, DataError, LocationError
from megatron_deepstack.platform.files.rename import give_new_name, sync

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.:-]+)*://")
_LOCAL: Final = "file://"
_OF_THE_FILE: Final = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors of one file, which the caller may expect; all others come from the connection or the service."""
_EXTRAS: Final = {"s3": "pip install 'megatron-deepstack[s3]'", "gs": "pip install gcsfs", "az": "pip install adlfs"}


@dataclass(frozen=True, slots=True)
class Location:
    """A file or folder, local or at a URL."""

    text: str

    @classmethod
    def parse(cls, text: str | os.PathLike[str] | Location) -> Location:
        """The location that `text` names: a URL if it begins with `scheme://`, otherwise (and for file://) a local
        path.
        """
        return text if isinstance(text, Location) else cls(os.fspath(text))

    def __str__(self) -> str:
        return self.text

    @property
    def is_local(self) -> bool:
        """Whether this is a path of this machine."""
        return self.text.startswith(_LOCAL) or _URL.match(self.text) is None

    @property
    def name(self) -> str:
        """The last part of path or URL."""
        return self.text.rstrip("/").rpartition("/")[2]

    @property
    def looked_in(self) -> str:
        """` (looked in FOLDER)` for a relative path, because it is relative to the current folder; otherwise empty."""
        return f" (looked in {os.getcwd()})" if self.is_local and not self.local_path().is_absolute() else ""

    def local_path(self) -> Path:
        """The path of a local file or folder."""
        assert self.is_local, self.text
        return Path(self.text.removeprefix(_LOCAL))

    def absolute(self) -> Location:
        """The same location, with a local path made absolute."""
        return Location(str(self.local_path().absolute())) if self.is_local else self

    def child(self, name: str) -> Location:
        """The location of `name`, which may have several parts, below this folder."""
        if self.is_local:
            return Location(os.path.join(self.text.removeprefix(_LOCAL), name))
        return Location(f"{self.text.rstrip('/')}/{name}")

    def exists(self) -> bool:
        """Whether there is such a file or folder."""
        return os.path.exists(self.local_path()) if self.is_local else self._info() is not None

    def is_folder(self) -> bool:
        """Whether there is a folder here, or there are objects below this URL."""
        if self.is_local:
            return os.path.isdir(self.local_path())
        info = self._info()
        return info is not None and info["type"] == "directory"

    def is_file(self) -> bool:
        """Whether there is a file or object here."""
        if self.is_local:
            return os.path.isfile(self.local_path())
        info = self._info()
        return info is not None and info["type"] == "file"

    def size(self) -> int:
        """The size of the file in bytes. Raises FileNotFoundError."""
        if self.is_local:
            return os.stat(self.local_path()).st_size
        info = self._info()
        if info is None:
            raise FileNotFoundError(2, "no such object", self.text)
        return int(info["size"])

    def read_bytes(self, first: int = 0, length: int | None = None) -> bytes:
        """Read a part of the file.

        Args:
            first: Offset of the first byte.
            length: Most bytes to read; None for all up to the end.

        Returns:
            The bytes; fewer than `length` where the file ends before.

        Raises:
            FileNotFoundError: There is no such file or object.
            LocationError: The connection or its service failed.
        """
        if self.is_local:
            with open(self.local_path(), "rb") as file:
                file.seek(first)
                return file.read(-1 if length is None else length)
        if length == 0:
            return b""
        with _remote(self.text):
            system, path = _system(self.text)
            return bytes(system.cat_file(path, start=first or None, end=None if length is None else first + length))

    def open_read(self) -> IO[bytes]:
        """The file, open for reading and seekable. Of a URL, blocks are fetched as they are read."""
        if self.is_local:
            return open(self.local_path(), "rb")
        with _remote(self.text):
            system, path = _system(self.text)
            return io.BufferedReader(_RemoteFile(self.text, system.open(path, "rb")), 2**20)

    def list(self, pattern: str = "*") -> tuple[Location, ...]:
        """Files and folders below this folder that match a glob pattern (`**` for any depth), sorted by name."""
        if self.is_local:
            found = glob.glob(pattern, root_dir=self.local_path(), recursive=True)
            return tuple(self.child(name) for name in sorted(found))
        with _remote(self.text):
            system, path = _system(self.text)
            names = system.glob(f"{glob.escape(path.rstrip('/'))}/{pattern}")
            return tuple(Location(system.unstrip_protocol(name)) for name in sorted(names))

    def delete(self) -> None:
        """Remove the file, if it is there."""
        if self.is_local:
            self.local_path().unlink(missing_ok=True)
            return
        with suppress(FileNotFoundError), _remote(self.text):
            system, path = _system(self.text)
            system.rm_file(path)

    @contextmanager
    def write(self) -> Iterator[IO[bytes]]:
        """A file to write. It appears here, in place of an older one, only when the block ends without an error.

        An OSError that the block raises is treated as an error of this file. So whatever the block reads from elsewhere
        must raise errors of other classes.
        """
        if self.is_local:
            with _local_file(self.local_path(), os.replace) as file:
                yield file
            return
        with ExitStack() as stack:
            with _spooling(self.text):
                file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="deepstack-upload-"))
                yield file
                file.flush()
            with _remote(self.text):
                system, path = _system(self.text)
                system.put_file(file.name, path)

    def create(self, data: bytes) -> None:
        """Write a file that must not exist yet; of several writers exactly one succeeds. Raises FileExistsError."""
        if self.is_local:
            with _local_file(self.local_path(), give_new_name) as file:
                file.write(data)
            return
        with _remote(self.text):
            system, path = _system(self.text)
            system.pipe_file(path, data, mode="create")

    def _info(self) -> dict[str, Any] | None:
        """fsspec's description (size, type); None if nothing is there. fsspec's own `exists` answers "no" for any
        error.
        """
        with suppress(FileNotFoundError), _remote(self.text):
            system, path = _system(self.text)
            info: dict[str, Any] = system.info(path)
            return info
        return None


def require_descriptors(path: str, error: OSError) -> None:
    """Raise DataError if a file could not be opened because too many other files are open; else do nothing.

    Args:
        path: The file that was to be opened, for the message.
        error: What the system answered.

    Raises:
        DataError: The process or the machine has no file descriptor left; the message gives the limit.
    """
    if error.errno in (errno.EMFILE, errno.ENFILE):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise DataError(
            f"{path}: could not be opened: {error.strerror}. The file is not to blame: a process may have {most} files "
            "open here. Raise the limit (`ulimit -n`), then run the same command again."
        ) from error


class _RemoteFile(io.RawIOBase):
    """A file of fsspec that raises our own errors."""

    def __init__(self, text: str, file: IO[bytes]) -> None:
        self._text, self._file = text, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with _remote(self._text):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _system(text: str) -> tuple[Any, str]:
    """fsspec's file system and its own name of the file; one connection per process and service, kept by fsspec."""
    import fsspec  # for URLs only

    try:
        system, path = fsspec.core.url_to_fs(text, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        scheme = text.partition("://")[0]
        advice = _EXTRAS.get(scheme, "install the fsspec package of that service")
        raise ConfigError([f"{text}: {scheme}:// cannot be read or written: {error}. {advice}"]) from error
    return system, path


@contextmanager
def _remote(text: str) -> Iterator[None]:
    """Raise errors of services as LocationError; leave those of one file, and our own, as they are."""
    try:
        yield
    except (*_OF_THE_FILE, ConfigError, AssertionError):
        raise
    except Exception as error:
        # Each fsspec package has its own exceptions (botocore's, aiohttp's, google's); none is imported here.
        raise LocationError(
            f"{text}: the connection or its service failed: {type(error).__name__}: {error}. Check network, address "
            "and credentials (for S3: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...), then run the same command again."
        ) from error


@contextmanager
def _spooling(text: str) -> Iterator[None]:
    """Name the local temporary folder in errors of the file in which an object is prepared: the service is not at
    fault.
    """
    try:
        yield
    except OSError as error:
        raise LocationError(
            f"{tempfile.gettempdir()}: {text} could not be put together here before it is sent: "
            f"{error.strerror or error}. Make room or name another folder in TMPDIR, then run the same command again."
        ) from error


@contextmanager
def _local_file(path: Path, publish: Callable[[Path, Path], None]) -> Iterator[IO[bytes]]:
    """A file that gets its name by `publish` once it is whole and on disk.

    The temporary name holds host and thread, whose number is its own on the host, so that neither two copies of one
    task on two nodes nor two threads of a process share it.
    """
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{threading.get_native_id()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()
