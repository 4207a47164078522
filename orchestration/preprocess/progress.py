"""Progress of a job: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from orchestration.preprocess.work import PartDone

_SECONDS_BETWEEN_LINES: Final = 5.0


class JobProgress:
    """Counts of a running job, shown on stderr. Used as a context manager around the work."""

    def __init__(self, num_images: int, num_records: int, console: Console | None = None) -> None:
        self.num_images = num_images
        self.num_records = num_records
        self.images = self.records = self.quarantined = self.flagged = 0
        self.images_now = self.bytes_now = 0
        self._console = console or Console(stderr=True)
        self._started = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("preprocess"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("preprocess", total=num_images + num_records, state="")

    def __enter__(self) -> JobProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the job began."""
        return time.monotonic() - self._started

    def restart_clock(self) -> None:
        """Work begins now: what was needed to get there is not counted."""
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """A line of text above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def add(self, done: PartDone, *, earlier: bool = False) -> None:
        """Count a part; `earlier` if it was found done, by a job before this one."""
        self.images += done.images
        self.records += done.records
        self.flagged += done.flagged
        self.quarantined += len(done.quarantined)
        if not earlier:
            self.images_now += done.images
            self.bytes_now += done.written_bytes
        self._bar.update(self._task, completed=self.images + self.records, state=self.state())
        if (
            not earlier
            and not self._console.is_terminal
            and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES
        ):
            self._last_line = time.monotonic()
            self.say(f"preprocess: {self.state()}")

    def state(self) -> str:
        """One line: images and records of all, speed, quarantined."""
        seconds = max(self.seconds, 1e-9)
        quarantined = f", {self.quarantined} quarantined" if self.quarantined else ""
        return (
            f"{self.images}/{self.num_images} images, {self.records}/{self.num_records} records, "
            f"{self.images_now / seconds:.0f} images/s, {self.bytes_now / seconds / 1e6:.0f} MB/s{quarantined}"
        )
