"""The folder of published numbers, and a loud word at the end of a run that went without it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

VARIABLE: Final = "DEEPSTACK_REFERENCE"
BESIDE: Final = Path(__file__).resolve().parents[2] / "shared" / "reference"
"""Where it is looked for unless the variable says otherwise."""
_ABSENT: Final = "no reference data at "


@pytest.fixture(scope="session")
def reference() -> Path:
    """The published numbers: $DEEPSTACK_REFERENCE, or shared/reference beside the repository.

    Without any the test is skipped. A variable that names no folder is a mistake, and the test fails.
    """
    named = os.environ.get(VARIABLE)
    folder = Path(named) if named else BESIDE
    if not folder.is_dir():
        if named:
            pytest.fail(f"{VARIABLE} is {named!r}, and that is no folder; correct it, or unset it to go without")
        pytest.skip(f"{_ABSENT}{folder}")
    return folder


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests compared nothing with the published numbers, and what to do about it."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if _ABSENT in str(report.longrepr)]
    if skipped:
        terminalreporter.section("NO REFERENCE DATA", sep="!", red=True, bold=True)
        terminalreporter.write_line(
            f"{len(skipped)} tests were skipped, because there is no reference data: nothing was compared with the "
            f"published numbers.\nSet {VARIABLE} to the folder that holds deepstack/, crops/, photos/, conversations/ "
            f"and tokenizer/, or put it at {BESIDE}, and run again.",
            red=True,
        )
