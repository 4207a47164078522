"""A folder of copies that never holds more than a given number of bytes, shared by all processes of a node.

Copies appear whole by a rename; the least recently used go first, down to nine tenths of the limit, so that looking for
them is rare. A lock is held only while room is made and reserved, never while data is fetched, written or read. A copy
that goes while somebody reads it stays readable for them, as an unlinked file does.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megatron_deepstack.config.schema import DataConfig
from megatron_deepstack.errors import StoreError

_LOW_WATER: Final = 0.9
"""Share of the limit that is left in use when room is made."""
_ABANDONED_SECONDS: Final = 3600.0
"""An unfinished copy older than this belongs to a process that was killed."""


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Where local copies of remote stores are kept, and how much of them."""

    folder: str | None = None
    """A folder of this node; one below the system's folder for temporary files if None."""
    limit_bytes: int = 64 * 2**30

    @classmethod
    def of(cls, data: DataConfig) -> CacheConfig:
        """What a recipe asks for."""
        return cls(data.cache_dir, int(data.cache_gib * 2**30))


class BoundedFolder:
    """Copies by name. Holds nothing open, so it is safe in threads, after a fork, and pickles."""

    def __init__(self, config: CacheConfig) -> None:
        self.root = Path(config.folder) if config.folder is not None else _own_temporary_path()
        self.limit_bytes = config.limit_bytes
        self._copies = self.root / "copies"
        with self.writing():
            if config.folder is None:
                _require_own(self.root)
            self._copies.mkdir(parents=True, exist_ok=True)

    def read_into(self, name: str, buffer: memoryview) -> bool:
        """Fill `buffer` with the copy `name`; False if there is none of that size."""
        try:
            with open(self._copies / name, "rb", buffering=0) as file:
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
        return True

    def keep(self, name: str, data: bytes | memoryview) -> None:
        """Keep a copy; raises StoreError if that is more than the whole limit, or cannot be written."""
        if len(data) > self.limit_bytes:
            raise StoreError(
                f"data.cache_gib allows {self.limit_bytes / 2**30:g} GiB in {self.root}, less than the {len(data)} "
                "bytes of one copy; raise it"
            )
        path = self._copies / name
        partial = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as usage:
                used = usage.read() + len(data)
                if used > self.limit_bytes:
                    used = self._make_room(len(data)) + len(data)
                with open(partial, "wb") as file:
                    file.truncate(len(data))  # a scan by another process counts it in full from now on
                usage.write(used)
            with open(partial, "r+b") as file:
                file.write(data)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise self._error(error) from error

    def drop(self, name: str) -> None:
        """Remove a copy, if it is there; its bytes count until room is made the next time."""
        (self._copies / name).unlink(missing_ok=True)

    def _make_room(self, wanted: int) -> int:
        """Remove the least recently used copies; returns the bytes left in use, counted anew."""
        files = []
        for folder, _, names in os.walk(self._copies):
            for name in names:
                with suppress(FileNotFoundError):
                    path = os.path.join(folder, name)
                    status = os.stat(path)
                    files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        target = max(int(_LOW_WATER * self.limit_bytes) - wanted, 0)
        now = time.time_ns()
        for used_at, size, path in sorted(files):
            if total <= target:
                break
            if path.endswith(".partial") and now - used_at < _ABANDONED_SECONDS * 1e9:
                continue
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what goes wrong with this folder in the block into a StoreError that names it."""
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

    def _error(self, error: OSError) -> StoreError:
        return StoreError(
            f"{self.root}: copies of a remote store cannot be kept here: {error.strerror or error}. Make room, name "
            "another folder with data.cache_dir, or allow less with data.cache_gib."
        )


@dataclass(frozen=True, slots=True)
class _Usage:
    """The counter in the locked file."""

    file: int
    unknown: int
    """What an unreadable counter stands for: so much that everything is counted anew."""

    def read(self) -> int:
        text = os.pread(self.file, 32, 0)
        return int(text) if text.strip().isdigit() else self.unknown if text else 0

    def write(self, used: int) -> None:
        os.ftruncate(self.file, 0)
        os.write(self.file, str(used).encode())


def _own_temporary_path() -> Path:
    return Path(tempfile.gettempdir()) / f"megatron-deepstack-cache-{os.getuid()}"


def _require_own(path: Path) -> None:
    """Make a folder of this user's alone: names below a folder that all may write to can be anybody's."""
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if status.st_uid != os.getuid() or not path.is_dir() or path.is_symlink():
        raise StoreError(f"{path}: belongs to somebody else; name a folder for local copies with data.cache_dir")
