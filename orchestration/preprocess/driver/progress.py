"""Progress of a job: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections import Counter, deque
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from megatron_deepstack.platform.progress import room_beside
from orchestration.preprocess.part.work import PartDone
from orchestration.preprocess.units import in_units

_SECONDS_BETWEEN_LINES: Final = 5.0
_SPEED_SECONDS: Final = 30.0
"""Stretch of time that the speed shown is taken over."""
_LEAST_NEEDED_FIRST: Final = (3, 1, 2, 5, 4)
"""Numbers of the parts of a state, in the order in which they are left out on a narrow terminal."""


class JobProgress:
    """Counts of a running job, shown on stderr. Used as a context manager around the work."""

    def __init__(self, num_images: int, num_records: int, console: Console | None = None) -> None:
        self.num_images = num_images
        self.num_records = num_records
        self.parts = self.images = self.records = self.quarantined = self.flagged = 0
        self.images_now = self.bytes_now = self.parts_done_again = 0
        self.workers = 0
        """Worker processes; 0 if the job's own process does the work."""
        self.nodes: Counter[str] = Counter()
        """Parts done now, by node."""
        self._console = console or Console(stderr=True)
        self._started = self._last_line = time.monotonic()
        self._recent = deque([(self._started, 0, 0, 0)])
        """Time, images, bytes and records done by then, of the last `_SPEED_SECONDS`."""
        self._records_now = 0
        self._bar = Progress(
            TextColumn("preprocess"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
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
        self._recent = deque([(self._started, 0, 0, 0)])

    def say(self, text: str) -> None:
        """A line of text above the bar."""
        self._console.print(Text(text), soft_wrap=True)

    def again(self, text: str) -> None:
        """Count and name a part that has to be done again."""
        self.parts_done_again += 1
        self.say(f"preprocess: {text}")

    def add_earlier(self, done: PartDone) -> None:
        """Count a part that a job before this one had finished."""
        self.parts += 1
        self.images += done.images
        self.records += done.records
        self.flagged += done.flagged
        self.quarantined += len(done.quarantined)

    def add(self, done: PartDone, node: str) -> None:
        """Count a part that has just been finished.

        Args:
            done: What was done.
            node: Name of the node that did it.
        """
        self.add_earlier(done)
        self.nodes[node] += 1
        self.images_now += done.images
        self.bytes_now += done.written_bytes
        self._records_now += done.records
        now = time.monotonic()
        self._recent.append((now, self.images_now, self.bytes_now, self._records_now))
        while len(self._recent) > 2 and now - self._recent[0][0] > _SPEED_SECONDS:
            self._recent.popleft()

    def show(self) -> None:
        """Bring the bar up to date, or write a line if the last one is some seconds old."""
        now = time.monotonic()
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self.images + self.records, state=self._fitting_state())
        elif now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"preprocess: {self.state()}")

    def state(self) -> str:
        """One line: images and records of all, speed of the last half minute, time left, quarantined."""
        return ", ".join(self._parts())

    def _parts(self) -> list[str]:
        started, images, written, _ = self._recent[0]
        seconds = max(time.monotonic() - started, 1e-9)
        parts = [
            f"{self.images}/{self.num_images} images",
            f"{self.records}/{self.num_records} records",
            f"{(self.images_now - images) / seconds:.0f} images/s",
            f"{in_units((self.bytes_now - written) / seconds)}/s",
            f"ETA {clock(self._seconds_left(seconds))}",
        ]
        return [*parts, *([f"{self.quarantined} quarantined"] if self.quarantined else [])]

    def _fitting_state(self) -> str:
        """The state without the parts for which a narrow terminal has no room, the least needed first."""
        parts = dict(enumerate(self._parts()))
        for least_needed in _LEAST_NEEDED_FIRST:
            if len(", ".join(parts.values())) > room_beside(self._console, "preprocess"):
                parts.pop(least_needed, None)
        return ", ".join(parts.values())

    def _seconds_left(self, seconds: float) -> float | None:
        """From the recent speed; images first, since records take a thousandth of their time. None if unknown."""
        _, images, _, records = self._recent[0]
        left, done = self.num_images - self.images, self.images_now - images
        if left == 0:
            left, done = self.num_records - self.records, self._records_now - records
        if left == 0:
            return 0.0
        return left * seconds / done if done else None


def clock(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
