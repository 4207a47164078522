"""Showing the progress of long work: how much is done, and how long the rest will take.

On a terminal a bar is shown; in a file or a pipe a plain line is written every few seconds. Both go to stderr, so that
stdout holds only results.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from megatron_deepstack.platform.quantity import amount, clock

SECONDS_BETWEEN_LINES: Final = 5.0
SHORTEST_BAR: Final = 4
"""Characters; rich makes a bar shorter to make room for the words beside it, and cuts words only after that."""


class WorkProgress:
    """The progress of work with a known amount, as a context manager. Ranks that must print nothing set `quiet`."""

    def __init__(
        self, verb: str, total: float, unit: str, *, console: Console | None = None, quiet: bool = False
    ) -> None:
        """Args:
        verb: First word of each line, such as `generate`.
        total: The amount of work.
        unit: What is counted, in the plural; `bytes` are shown as MB and GB.
        console: Where to write; stderr if None.
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
        """Show that the amount `done` is done; it may be a fraction."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total, state=self._fitting_state(done))
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._console.print(Text(f"{self.verb}: {self.state(done)}"), soft_wrap=True)

    def state(self, done: float) -> str:
        """Say how much is done, and how long the rest takes at the mean speed until now."""
        spent = time.monotonic() - self._started
        left = f"{clock(spent / done * (self.total - done))} left" if done else "time left not known yet"
        parts = f"{amount(done, self.unit)} of {amount(self.total, self.unit)} {self.unit}, {left}"
        return parts.replace(" bytes,", ",")

    def _fitting_state(self, done: float) -> str:
        """The state in the widest form for which the terminal has room, beside the verb and a short bar."""
        whole, percent = self.state(done), f"{done / self.total:.0%}" if self.total else "100%"
        left = whole.rpartition(", ")[2]
        room = room_beside(self._console, self.verb)
        return next((words for words in (whole, f"{percent}, {left}", percent) if len(words) <= room), percent)


def room_beside(console: Console, verb: str) -> int:
    """How many characters of a state fit on a line.

    Args:
        console: The terminal.
        verb: The first word of the line.

    Returns:
        Width of the terminal without the verb, a bar of the shortest length, and the spaces between them.
    """
    return console.width - len(verb) - SHORTEST_BAR - 2
