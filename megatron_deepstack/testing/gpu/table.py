"""The rows of a trial as text: a line at a time while it runs, and a Markdown table at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from megatron_deepstack.testing.gpu.catalogue import PARTS
from megatron_deepstack.testing.gpu.report import Row, Verdict

DEVICE: Final = "device and versions"
"""What the row with the machine's name and versions is called."""


def table_line(row: Row) -> str:
    """A row as one line of fixed columns."""
    return f"{row.part:<13} {row.what:<44} {row.verdict:<9} {row.text()}"


def markdown(rows: Sequence[Row], seconds: Mapping[str, float]) -> str:
    """The whole trial: the machine, a table, and the last lines of every failure.

    Args:
        rows: All rows, in the order in which they came.
        seconds: How long each part took.

    Returns:
        Markdown.
    """
    lines = ["# Trial", ""]
    lines += [f"{row.text()}." for row in rows if row.what == DEVICE]
    counts = {verdict: sum(row.verdict is verdict for row in rows) for verdict in Verdict}
    lines += ["", ", ".join(f"{count} rows {verdict}" for verdict, count in counts.items()) + ".", ""]
    lines += ["| part | seconds | what | verdict | result |", "| --- | --- | --- | --- | --- |"]
    for part in PARTS:
        taken = f"{seconds[part.name]:.0f}" if part.name in seconds else ""
        lines += [
            f"| {part.name} | {taken} | {_cell(row.what)} | {row.verdict} | {_cell(row.text())} |"
            for row in rows
            if row.part == part.name and row.what != DEVICE
        ]
    for row in rows:
        if row.traceback:
            lines += ["", f"## {row.part}: {row.what}", "", "```", *row.traceback, "```"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
