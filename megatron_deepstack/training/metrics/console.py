"""The console of a run: a line a step, plain in a file or a pipe; on a terminal coloured, above a bar."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from megatron_deepstack.training.metrics.record import StepRecord

_GIB = 1 << 30


class StepConsole:
    """Lines of steps that are due: each `interval`-th, the first and the last, and those that stand out."""

    def __init__(self, console: Console, *, first_step: int, num_steps: int, interval: int) -> None:
        self.console, self.first_step, self.num_steps, self.interval = console, first_step, num_steps, interval
        self._begin = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("training", total=num_steps, completed=first_step, left="")
            self._bar.start()

    def say(self, text: str) -> None:
        """A line as it is."""
        self.console.print(Text(text))

    def add(self, record: StepRecord) -> None:
        """A line about the step if it is due, and the bar moved on."""
        left = _clock(self._seconds_left(record.step))
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, left=f"{left} left")
        due = record.step % self.interval == 0 or record.step in (self.first_step + 1, self.num_steps)
        if due or record.validation_loss is not None or record.spike or not record.applied:
            self.console.print(self._line(record, left))

    def close(self) -> None:
        """Take the bar away; the lines stay."""
        if self._bar is not None:
            self._bar.stop()

    def _line(self, record: StepRecord, left: str) -> Text:
        width = len(str(self.num_steps))
        line = Text()
        line.append(f"step {record.step:>{width}}/{self.num_steps}", style="dim")
        for name, value, unit in _columns(record):
            line.append(f"  {name} " if name else "  ", style="dim")
            line.append(value, style="bold" if name == "loss" else "")
            line.append(unit, style="dim")
        if self._bar is None:
            line.append(f"  left {left}")
        for words, style in _remarks(record):
            line.append(f"  {words}", style=style)
        return line

    def _seconds_left(self, step: int) -> float:
        return (time.monotonic() - self._begin) / (step - self.first_step) * (self.num_steps - step)


def _columns(record: StepRecord) -> Iterator[tuple[str, str, str]]:
    """Name, value and unit of what every line shows."""
    yield "loss", "none" if record.loss is None else f"{record.loss:.4f}", ""
    yield "lr", f"{record.lr:.2e}", ""
    yield "grad", f"{record.gradient_norm:.2f}", ""
    yield "", f"{record.tokens_per_second:,.0f}", " tokens/s"
    yield "", f"{record.tflops_per_second_per_rank:.3g}", " TFLOP/s a rank"
    if record.mfu is not None:
        yield "MFU", f"{record.mfu:.1%}", ""
    yield "data", f"{record.seconds.get('data', 0.0) / max(record.step_seconds, 1e-9):.0%}", ""
    yield "", f"{record.memory_bytes / _GIB:.1f}", " GiB"


def _remarks(record: StepRecord) -> Iterator[tuple[str, str]]:
    """What this step has to say beyond the columns, with its style."""
    if record.validation_loss is not None:
        yield f"validation loss {record.validation_loss:.4f}", "bold green"
    if record.unreadable:
        yield f"{record.unreadable} unreadable", "yellow"
    if record.spike:
        yield "SPIKE", "bold red"
    if not record.applied:
        yield f"SKIPPED: {record.skipped_because}", "bold red"


def say(text: str) -> None:
    """A line on the console, where there is no log of steps yet.

    Args:
        text: The line.
    """
    Console(highlight=False, soft_wrap=True).print(Text(text))


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, as short as they can be read."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
