"""A folder of copies that never holds more than a given number of bytes, shared by all processes of a node.

Copies appear as a whole, by a rename. When the limit is reached, the least recently used copies are removed down to
nine tenths of the limit, so that this search is rare. Every copy's bytes are reserved in a counter; the counter's lock
is held for a few system calls, whatever the number of copies. One process at a time makes room, with a lock of its own;
others continue as long as the counter leaves them room. A copy that is removed while somebody reads it stays readable
for them, as an unlinked file does.

Besides copies of single views and blocks, which lie in at most 256 folders, there are whole folders, one for each store
that was opened, which `remote.copy_index` makes. They count as one copy each, and are removed only after an hour
without use.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megatron_deepstack.config.schema import DataConfig
from megatron_deepstack.errors import CacheError

_LOW_WATER: Final = 0.9
"""Share of the limit that stays in use when room is made."""
_ABANDONED_SECONDS: Final = 3600.0
"""An older unfinished copy belongs to a process that was killed; an older held folder is not in use."""
_TRIES: Final = 3
"""How often room is made for one copy. After that it is not kept: all others are being written or are in use."""


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Where local copies of remote stores are kept, and how many bytes of them."""

    folder: str | None = None
    """A folder of this node; one below the system's folder for temporary files if None."""
    limit_bytes: int = 64 * 2**30

    @classmethod
    def of(cls, data: DataConfig) -> CacheConfig:
        """The configuration that a recipe asks for."""
        return cls(data.cache_dir, int(data.cache_gib * 2**30))


class BoundedFolder:
    """Copies by name. It keeps nothing open, so it is safe in threads and after a fork, and can be pickled."""

    def __init__(self, config: CacheConfig) -> None:
        """Make the folder if it is missing. Raises CacheError if it cannot be made, or belongs to another user."""
        self.root = Path(config.folder) if config.folder is not None else _own_temporary_path()
        self.limit_bytes = config.limit_bytes
        self._copies = self.root / "copies"
        self.held = self.root / "index"
        """Where held folders lie, each with a `.lock`, and a `.complete` whose time is that of its last use."""
        with self.writing():
            if config.folder is None:
                _require_own(self.root)
            self._copies.mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        """Whether there is a copy `name`; it may be removed at any time."""
        return self._path(name).exists()

    def read_into(self, name: str, buffer: memoryview) -> bool:
        """Read a copy, which then counts as just used.

        Args:
            name: The copy's name.
            buffer: Receives its bytes; undefined where the result is False.

        Returns:
            Whether there was a copy of exactly the buffer's size.

        Raises:
            CacheError: The copy is there and cannot be read.
        """
        try:
            with open(self._path(name), "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != len(buffer):
                    return False
                os.utime(file.fileno())
                filled = 0
                while filled < len(buffer):
                    count = file.readinto(buffer[filled:])
                    if not count:
                        return False
                    filled += count
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._error(error) from error
        return True

    def keep(self, name: str, data: bytes | memoryview) -> None:
        """Keep a copy, if room can be made for it. It is not kept if all other copies are in use or being written.

        Args:
            name: The copy's name; its parts may be divided by slashes.
            data: Its bytes.

        Raises:
            CacheError: It is larger than the whole limit, or cannot be written.
        """
        self._require_within(len(data), "one copy")
        path = self._path(name)
        partial = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}.partial")
        try:
            if not self._reserve(len(data), partial):
                return
            with open(partial, "r+b") as file:
                file.write(data)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise self._error(error) from error

    def drop(self, name: str) -> None:
        """Remove a copy, if there is one; its bytes stay counted until room is made the next time."""
        self._path(name).unlink(missing_ok=True)

    def reserve_held(self, size: int, what: str) -> None:
        """Count bytes that a held folder is about to take.

        Args:
            size: Number of bytes.
            what: What they are for, for messages.

        Raises:
            CacheError: They are more than the limit.
        """
        self._require_within(size, what)
        self._reserve(size, None)

    @contextmanager
    def one_at_a_time(self, name: str) -> Iterator[None]:
        """A block that only one thread of one process of the node runs at a time for `name`.

        So what is missing is fetched once. There are 64 locks, so other names may have to wait too, for a short time.
        Such blocks must not be nested.
        """
        folder = self.root / "locks"
        with self.writing():
            folder.mkdir(exist_ok=True)
            file = open(folder / str(zlib.crc32(name.encode()) % 64), "ab")  # noqa: SIM115 - closed below
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _path(self, name: str) -> Path:
        """The path of a copy; names with slashes are spread over 256 folders."""
        if "/" not in name:
            return self._copies / name
        return self._copies / f"{zlib.crc32(name.encode()) % 256:02x}" / name.replace("/", "-")

    def _require_within(self, size: int, what: str) -> None:
        if size > self.limit_bytes:
            raise CacheError(
                f"data.cache_gib allows {self.limit_bytes / 2**30:g} GiB in {self.root}, less than the {size} "
                f"bytes of {what}; raise it"
            )

    def _reserve(self, size: int, partial: Path | None) -> bool:
        """Count `size` bytes, and claim them with an unfinished file; False if no room could be made for them."""
        for _ in range(_TRIES):
            with self._locked() as usage:
                used = usage.read() + size
                if used <= self.limit_bytes:
                    if partial is not None:
                        _claim(partial, size)
                    usage.write(used)
                    return True
            self._make_room(size)
        return False

    def _make_room(self, wanted: int) -> None:
        """Remove the least recently used copies and count all bytes again, unless another process has just done so.

        What others add in the meantime is counted by them, and perhaps once more here: the counter is never too low.
        """
        with open(self.root / "sweep", "ab") as sweep:
            fcntl.flock(sweep, fcntl.LOCK_EX)
            with self._locked() as usage:
                before = usage.read()
            if before + wanted <= self.limit_bytes:
                return
            left = self._remove_oldest(wanted)
            with self._locked() as usage:
                usage.write(left + max(usage.read() - before, 0))

    def _remove_oldest(self, wanted: int) -> int:
        """Remove the least recently used copies; returns the bytes still in use, counted again."""
        files = sorted([*self._files(), *self._held_folders()])
        total = sum(size for _, size, _ in files)
        target = max(int(_LOW_WATER * self.limit_bytes) - wanted, 0)
        now = time.time_ns()
        for used_at, size, path in files:
            if total <= target:
                break
            kept = path.endswith(".partial") or os.path.dirname(path) == str(self.held)
            if kept and now - used_at < _ABANDONED_SECONDS * 1e9:
                continue
            if os.path.dirname(path) == str(self.held):
                remove_held(Path(path), used_at)
            else:
                with suppress(FileNotFoundError):
                    os.unlink(path)
            total -= size
        self._remove_empty_folders()
        return total

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """Time of the last use, bytes and path of each copy."""
        for folder, _, names in os.walk(self._copies):
            for name in names:
                with suppress(FileNotFoundError):
                    path = os.path.join(folder, name)
                    status = os.stat(path)
                    yield status.st_mtime_ns, status.st_size, path

    def _held_folders(self) -> Iterator[tuple[int, int, str]]:
        """The same for each held folder. Its arrays count, as `reserve_held` counted them; its documents do not."""
        if not self.held.is_dir():
            return
        for folder in self.held.iterdir():
            size = 0
            for inside, _, names in os.walk(folder):
                for name in names:
                    if name.startswith(".") or name.endswith(".json"):
                        continue
                    with suppress(FileNotFoundError):
                        size += os.stat(os.path.join(inside, name)).st_size
            yield last_use_of_held(folder), size, str(folder)

    def _remove_empty_folders(self) -> None:
        """Remove empty folders below `copies`; one that gets a file meanwhile stays, or `_claim` makes it again."""
        for folder, _, _ in os.walk(self._copies, topdown=False):
            if folder != str(self._copies):
                with suppress(OSError):
                    os.rmdir(folder)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what goes wrong with this folder in the block into a CacheError that names it."""
        try:
            yield
        except OSError as error:
            raise self._error(error) from error

    @contextmanager
    def _locked(self) -> Iterator[_Usage]:
        """The bytes in use, while no other process or thread changes them."""
        with open(self.root / "usage", "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield _Usage(file.fileno(), self.limit_bytes)

    def _error(self, error: OSError) -> CacheError:
        return CacheError(
            f"{self.root}: copies of a remote store cannot be kept here: {error.strerror or error}. Make room, name "
            "another folder with data.cache_dir, or allow less with data.cache_gib."
        )


@dataclass(frozen=True, slots=True)
class _Usage:
    """The counter in the locked file."""

    file: int
    unknown: int
    """The value of an unreadable counter: so large that everything is counted again."""

    def read(self) -> int:
        text = os.pread(self.file, 32, 0)
        return int(text) if text.strip().isdigit() else self.unknown if text else 0

    def write(self, used: int) -> None:
        os.ftruncate(self.file, 0)
        os.write(self.file, str(used).encode())


def _claim(partial: Path, size: int) -> None:
    """Make an unfinished file of its full size, so that every process that counts sees all of its bytes."""
    while True:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), open(partial, "wb") as file:  # another process may remove the empty folder
            file.truncate(size)
            return


def last_use_of_held(folder: Path) -> int:
    """The time in ns of a held folder's last use; if it is being made, of its start; 0 if it is gone."""
    for path in (folder / ".complete", folder):
        with suppress(FileNotFoundError):
            return path.stat().st_mtime_ns
    return 0


def remove_held(folder: Path, used_at: int) -> None:
    """Remove a held folder, unless it is being made or was used after `used_at`. Readers keep what they have mapped.

    Args:
        folder: The held folder.
        used_at: Time in ns, as `last_use_of_held` gives it.
    """
    with suppress(FileNotFoundError), open(folder / ".lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if last_use_of_held(folder) <= used_at:
            (folder / ".complete").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _own_temporary_path() -> Path:
    return Path(tempfile.gettempdir()) / f"megatron-deepstack-cache-{os.getuid()}"


def _require_own(path: Path) -> None:
    """Make a folder that belongs to this user: in a folder that all may write to, any name may belong to anybody."""
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if status.st_uid != os.getuid() or not path.is_dir() or path.is_symlink():
        raise CacheError(f"{path}: belongs to somebody else; name a folder for local copies with data.cache_dir")
