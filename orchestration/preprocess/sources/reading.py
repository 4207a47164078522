"""How far the reading of records has come: a line every few seconds, with the time that is left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import IO, Any, Final, cast

from orchestration.preprocess.driver.progress import clock

_SECONDS_BETWEEN_LINES: Final = 5.0


class Reading:
    """Files that are read one after the other. Each file counts the same: their sizes are not asked for."""

    def __init__(self, num_files: int, say: Callable[[str], None]) -> None:
        """`say` is called with each line."""
        self._num_files = num_files
        self._say = say
        self._done = 0
        self._started = self._said = time.monotonic()

    def watch(self, file: IO[bytes]) -> IO[bytes]:
        """The next file, which reports when it is read."""
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        self._done += 1
        return cast(IO[bytes], _Watched(file, lambda: self._look(file, max(size, 1))))

    def _look(self, file: IO[bytes], size: int) -> None:
        now = time.monotonic()
        if now - self._said < _SECONDS_BETWEEN_LINES:
            return
        self._said = now
        share = (self._done - 1 + min(file.tell() / size, 1.0)) / self._num_files
        left = (now - self._started) * (1 - share) / share if share else None
        place = f"file {self._done} of {self._num_files}"
        self._say(f"preprocess: reading records, {place}, {share:.0%} of all, ETA {clock(left)}")


class _Watched:
    """An open file that calls a function before it is read."""

    def __init__(self, file: IO[bytes], look: Callable[[], None]) -> None:
        self._file = file
        self._look = look

    def read(self, size: int = -1) -> bytes:
        self._look()
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
