"""Faults that were made, found and survived, as a table at the end of `make faults`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Fault:
    """One line of the table."""

    fault: str
    found_after: str
    lost_steps: str
    outcome: str


TABLE = pytest.StashKey[list[Fault]]()
RecordFault = Callable[..., None]


def pytest_configure(config: pytest.Config) -> None:
    config.stash.setdefault(TABLE, [])


@pytest.fixture
def record_fault(request: pytest.FixtureRequest) -> RecordFault:
    """Call with `fault`, `found_after` (as said by the run: seconds, or at what), `lost_steps` and `outcome`."""

    def record(*, fault: str, found_after: str, lost_steps: int | str, outcome: str) -> None:
        request.config.stash[TABLE].append(Fault(fault, found_after, str(lost_steps), outcome))

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(TABLE, [])
    if not rows:
        return
    lines = [("fault", "found after", "lost steps", "outcome")]
    lines += [(row.fault, row.found_after, row.lost_steps, row.outcome) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    terminalreporter.section("faults")
    for line in lines:
        terminalreporter.write_line(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )
