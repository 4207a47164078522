"""Progress of long work: what is done, how far it is and how long it still takes.

On a terminal this is a bar; in a file or a pipe a plain line every few seconds. It goes to stderr, so that stdout holds
results only.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from megatron_deepstack.platform.quantity import clock, count

SECONDS_BETWEEN_LINES: Final = 5.0


class WorkProgress:
    """Progress through `total` units of work. Used as a context manager; on ranks that say nothing, `quiet`."""

    def __init__(
        self, verb: str, total: float, unit: str, *, console: Console | None = None, quiet: bool = False
    ) -> None:
        """Args:
        verb: First word of each line, such as `generate`.
        total: How much there is to do.
        unit: What is counted, in the plural; `bytes` are shown as MB and GB.
        console: Where to write; stderr by default.
        quiet: Write nothing.
        """
        self.verb, self.total, self.unit = verb, total, unit
        self._console = console or Console(stderr=True, quiet=quiet)
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            columns = (TextColumn(verb), BarColumn(bar_width=24), TextColumn("{task.fields[state]}"))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(verb, total=total, state="")

    def __enter__(self) -> WorkProgress:
        self._started = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, done: float) -> None:
        """Show that `done` of the units are done; parts of one count."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total, state=self.state(done))
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._console.print(Text(f"{self.verb}: {self.state(done)}"), soft_wrap=True)

    def state(self, done: float) -> str:
        """How far, and how long it still takes at the mean speed so far."""
        spent = time.monotonic() - self._started
        left = f"{clock(spent / done * (self.total - done))} left" if done else "time left not known yet"
        return f"{count(done, self.unit)} of {count(self.total, self.unit)} {self.unit}, {left}".replace(" bytes,", ",")
