"""What a part of the trial reports: rows with numbers and a verdict, each on disk as soon as it is known."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.platform.files.strict_json import from_line, to_line

Number = float | int | str

_TRACEBACK_LINES: Final = 12
"""Of a traceback, this many of the last lines are kept."""


class Verdict(StrEnum):
    """What a row says."""

    MEASURED = "measured"
    """Numbers without a bound."""
    PASSED = "passed"
    FAILED = "failed"
    LEFT_OUT = "left out"
    """The machine lacks what it needs, or no time was left; the note says which."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    part: str
    what: str
    verdict: Verdict
    numbers: Mapping[str, Number] = field(default_factory=dict)
    """By name with unit, such as `ms`."""
    note: str = ""
    """In a few words, for the table."""
    traceback: tuple[str, ...] = ()
    """Of a failure, the last lines."""

    def text(self) -> str:
        """Numbers and note on one line."""
        numbers = ", ".join(f"{name} {_plain(value)}" for name, value in self.numbers.items())
        return "; ".join(filter(None, (numbers, self.note)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What every part is told."""

    tiny: bool
    """Run at a size that a CPU takes seconds for."""
    work: Path
    """Folder that all parts of a trial share, removed after it."""
    output: Path
    """Folder for what is kept."""

    @property
    def expected(self) -> Path:
        """The numbers of the same cases on the CPU."""
        return self.work / "cpu_numbers.pt"

    @property
    def ceiling(self) -> Path:
        """What the machine's matrix products reach."""
        return self.work / "ceiling.json"


class Report:
    """Where a part puts its rows."""

    def __init__(self, part: str, file: Path) -> None:
        self.part, self._file = part, file

    def measured(self, what: str, note: str = "", /, **numbers: Number) -> None:
        """Report numbers that have no bound.

        Args:
            what: What was measured.
            note: In a few words, for the table.
            **numbers: By name with unit, such as `ms`.
        """
        self._add(Row(part=self.part, what=what, verdict=Verdict.MEASURED, numbers=numbers, note=note))

    def judged(self, what: str, passed: bool, note: str = "", /, **numbers: Number) -> None:
        """Report numbers that are within their bounds, or not.

        Args:
            what: What was tried.
            passed: Whether they are within them.
            note: What the bounds are.
            **numbers: By name with unit, such as `ms`.
        """
        verdict = Verdict.PASSED if passed else Verdict.FAILED
        self._add(Row(part=self.part, what=what, verdict=verdict, numbers=numbers, note=note))

    def left_out(self, what: str, reason: str) -> None:
        """Report what was not tried.

        Args:
            what: What it is.
            reason: What the machine lacks for it.
        """
        self._add(Row(part=self.part, what=what, verdict=Verdict.LEFT_OUT, note=reason))

    @contextmanager
    def case(self, what: str) -> Iterator[None]:
        """A block whose failure costs one row: it is reported with its traceback, and the part goes on."""
        try:
            yield
        except Exception as error:
            self._add(failure(self.part, what, error))

    def _add(self, row: Row) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(to_line(asdict(row)) + "\n")


def failure(part: str, what: str, error: BaseException) -> Row:
    """The row of an exception.

    Args:
        part: The part in which it was raised.
        what: What was tried.
        error: The exception.

    Returns:
        A failed row with the error's first line and the last lines of its traceback.
    """
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    summary = (str(error).strip().splitlines() or [""])[0]
    return Row(
        part=part,
        what=what,
        verdict=Verdict.FAILED,
        note=f"{type(error).__name__}: {summary}"[:300],
        traceback=tuple(lines[-_TRACEBACK_LINES:]),
    )


def read_rows(file: Path) -> list[Row]:
    """Rows that a part has reported so far. A line that is still being written is left for the next call."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [_row(from_line(line)) for line in lines]


def _row(values: dict[str, Any]) -> Row:
    return Row(**{**values, "verdict": Verdict(values["verdict"]), "traceback": tuple(values["traceback"])})


def _plain(value: Number) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
