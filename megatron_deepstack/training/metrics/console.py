"""The console of a run: a line a step, plain in a file or a pipe; on a terminal coloured, above a bar."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from megatron_deepstack.platform.quantity import clock, flop_rate
from megatron_deepstack.training.metrics.record import StepRecord

_GIB = 1 << 30
_SHOWN = 0.005
"""Smallest share of padding, and smallest imbalance of the replicas, that has a column."""


class StepConsole:
    """Lines of steps that are due: each `interval`-th, the first and the last, and those that stand out."""

    def __init__(self, console: Console, *, first_step: int, num_steps: int, interval: int) -> None:
        """Start the progress bar if the console is a terminal.

        Args:
            console: Where lines go.
            first_step: Steps done before this run.
            num_steps: Steps of the whole run.
            interval: Number of steps from one line to the next.
        """
        self.console, self.first_step, self.num_steps, self.interval = console, first_step, num_steps, interval
        self._begin = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("training", total=num_steps, completed=first_step, left="")
            self._bar.start()

    def say(self, text: str) -> None:
        """A line as it is."""
        self.console.print(Text(text))

    def add(self, record: StepRecord) -> None:
        """A line about the step if it is due, and the bar moved on."""
        left = clock(self._seconds_left(record.step))
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
        """The step's line. On a terminal too narrow for all of it the least important columns are left out."""
        remarks = Text.assemble(*((f"  {words}", style) for words, style in _remarks(record)))
        columns, dropped = list(_columns(record)), list(_FIRST_TO_GO)
        while True:
            line = self._with_columns(record, columns)
            if self._bar is None:
                line.append(f"  left {left}")
            line.append_text(remarks)
            fits = not self.console.is_terminal or line.cell_len <= self.console.width
            if fits or not dropped:
                return line
            gone = dropped.pop(0)
            columns = [column for column in columns if column.kind != gone]

    def _with_columns(self, record: StepRecord, columns: Sequence[_Column]) -> Text:
        width = len(str(self.num_steps))
        line = Text()
        line.append(f"step {record.step:>{width}}/{self.num_steps}", style="dim")
        for column in columns:
            line.append(f"  {column.name} " if column.name else "  ", style="dim")
            line.append(column.value, style="bold" if column.kind == "loss" else "")
            line.append(column.unit, style="dim")
        return line

    def _seconds_left(self, step: int) -> float:
        return (time.monotonic() - self._begin) / (step - self.first_step) * (self.num_steps - step)


class _Column(NamedTuple):
    """What every line shows of one thing."""

    kind: str
    name: str
    value: str
    unit: str = ""


_FIRST_TO_GO = ("memory", "busiest", "balance", "padding", "uneven", "data", "grad", "flops", "lr", "mfu", "tokens")
"""Kinds of columns in the order in which they are left out on a narrow terminal; the loss stays."""


def _columns(record: StepRecord) -> Iterator[_Column]:
    yield _Column("loss", "loss", "none" if record.loss is None else f"{record.loss:.4f}")
    yield _Column("lr", "lr", f"{record.lr:.2e}")
    yield _Column("grad", "grad", f"{record.gradient_norm:.2f}")
    yield _Column("tokens", "", f"{record.tokens_per_second:,.0f}", " tokens/s")
    rate, unit = flop_rate(record.tflops_per_second_per_rank)
    yield _Column("flops", "", rate, f" {unit} a rank")
    if record.mfu is not None:
        yield _Column("mfu", "MFU", f"{record.mfu:.1%}")
    if record.padding >= _SHOWN:
        yield _Column("padding", "pad", f"{record.padding:.0%}")
    if record.imbalance >= _SHOWN:
        yield _Column("uneven", "uneven", f"{record.imbalance:.0%}")
    if record.balance_loss is not None:
        yield _Column("balance", "balance", f"{record.balance_loss:.3f}")
    if record.busiest_expert is not None:
        yield _Column("busiest", "busiest expert", f"{record.busiest_expert:.0%}")
    yield _Column("data", "data", f"{record.seconds.get('data', 0.0) / max(record.step_seconds, 1e-9):.0%}")
    yield _Column("memory", "", f"{record.memory_bytes / _GIB:.1f}", " GiB")


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
