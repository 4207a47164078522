"""Rows of the trial: what a part reports is on disk at once, failures carry their traceback, tables hold all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_deepstack.testing.gpu.report import Report, Row, Verdict, read_rows
from megatron_deepstack.testing.gpu.table import DEVICE, markdown, table_line


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_rows_are_read_back_as_they_were_reported(file: Path) -> None:
    report = Report("demo", file)
    report.measured("speed", "on a | pipe", ms=1.5, calls=3)
    report.judged("loss", False, "bound 1", loss=2.0)
    report.left_out("fp8", "no GPU")
    assert [(row.part, row.what, row.verdict, row.text()) for row in read_rows(file)] == [
        ("demo", "speed", Verdict.MEASURED, "ms 1.5, calls 3; on a | pipe"),
        ("demo", "loss", Verdict.FAILED, "loss 2; bound 1"),
        ("demo", "fp8", Verdict.LEFT_OUT, "no GPU"),
    ]


def test_a_case_that_raises_costs_one_row(file: Path) -> None:
    report = Report("demo", file)
    with report.case("breaks"):
        raise ValueError("the reason\nand more")
    with report.case("works"):
        report.judged("works", True)
    broken, works = read_rows(file)
    assert (broken.verdict, broken.note) == (Verdict.FAILED, "ValueError: the reason")
    assert broken.traceback[-2:] == ("ValueError: the reason", "and more")
    assert any("test_report.py" in line for line in broken.traceback)
    assert works.verdict is Verdict.PASSED


def test_a_line_that_is_still_being_written_is_left_for_later(file: Path) -> None:
    Report("demo", file).measured("first")
    with file.open("a") as half:
        half.write('{"part": "de')
    assert [row.what for row in read_rows(file)] == ["first"]
    assert read_rows(file.parent / "not there") == []


def test_the_table_names_the_machine_counts_verdicts_and_ends_with_tracebacks() -> None:
    rows = [
        Row(part="environment", what=DEVICE, verdict=Verdict.MEASURED, numbers={"device": "a GPU", "torch": "2.11"}),
        Row(part="ceilings", what="copy", verdict=Verdict.MEASURED, numbers={"GBs": 3000.123}, note="a|b"),
        Row(part="demo", what="train", verdict=Verdict.FAILED, note="boom", traceback=("line 1", "boom")),
    ]
    text = markdown(rows, {"ceilings": 12.3})
    assert "device a GPU, torch 2.11." in text
    assert "2 rows measured, 0 rows passed, 1 rows failed, 0 rows left out." in text
    assert "| ceilings | 12 | copy | measured | GBs 3000; a\\|b |" in text
    assert text.rstrip().endswith("## demo: train\n\n```\nline 1\nboom\n```")
    assert table_line(rows[2]).split() == ["demo", "train", "failed", "boom"]
