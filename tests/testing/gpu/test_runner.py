"""The runner of the trial: parts in processes of their own, deadlines, failures that cost one row."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from megatron_deepstack.testing.gpu import runner
from megatron_deepstack.testing.gpu.catalogue import PARTS, TOTAL_SECONDS, Part, part_named, with_needed
from megatron_deepstack.testing.gpu.report import Report, Settings, Verdict
from megatron_deepstack.testing.gpu.runner import Trial

GOOD = "report.measured('done', cuda=os.environ.get('CUDA_VISIBLE_DEVICES', 'unset'))"
BODIES = {
    "good": GOOD,
    "raises": "report.measured('first'); raise ValueError('of the part')",
    "dies": "report.measured('first'); os.kill(os.getpid(), 9)",
    "hangs": "report.measured('first'); time.sleep(600)",
    "beside": GOOD,
}
PROGRAM = """
import os, sys, time
from pathlib import Path
from megatron_deepstack.testing.gpu.report import Report
report = Report(sys.argv[1], Path(sys.argv[2]))
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    work, output = tmp_path / "work", tmp_path / "output"
    work.mkdir()
    output.mkdir()
    return Settings(tiny=True, work=work, output=output)


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are scripts instead of modules, in real processes."""
    for name, body in BODIES.items():
        (tmp_path / f"{name}.py").write_text(PROGRAM + body)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} {tmp_path}/"$1".py "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", os.getcwd())


def part(name: str, seconds: int = 60, **more: object) -> Part:
    return Part(name=name, title=f"part {name}", seconds=seconds, **more)  # type: ignore[arg-type]


@pytest.mark.usefixtures("scripted")
def test_every_bad_end_costs_its_own_rows_alone(settings: Settings) -> None:
    said: list[str] = []
    trial = Trial(settings, said.append)
    trial.run([part("raises"), part("dies"), part("hangs", seconds=1), part("good")])
    found = [(row.part, row.what, row.verdict) for row in trial.rows]
    assert found == [
        ("raises", "first", Verdict.MEASURED),
        ("raises", "part raises", Verdict.FAILED),
        ("dies", "first", Verdict.MEASURED),
        ("dies", "part dies", Verdict.FAILED),
        ("hangs", "first", Verdict.MEASURED),
        ("hangs", "part hangs", Verdict.FAILED),
        ("good", "done", Verdict.MEASURED),
    ]
    notes = [row.note for row in trial.rows if row.verdict is Verdict.FAILED]
    assert notes[0] == "exit code 1; ValueError: of the part"
    assert notes[1].startswith("killed by SIGKILL")
    assert notes[2] == "not done after 4 s, and ended"
    assert trial.rows[1].traceback[-1] == "ValueError: of the part"
    assert len(said) == len(found)
    document = json.loads((settings.output / runner.RESULTS).read_text())
    assert [row["what"] for row in document["rows"]] == [what for _, what, _ in found]
    assert "ValueError: of the part" in (settings.output / runner.LOG).read_text()
    assert "## raises: part raises" in (settings.output / runner.TABLE).read_text()


@pytest.mark.usefixtures("scripted")
def test_a_part_on_the_cpu_sees_no_gpu_and_is_waited_for(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    trial = Trial(settings, lambda line: None)
    trial.run([part("beside", on_cpu=True), part("good", needs=("beside",))])
    assert [(row.part, row.numbers["cuda"]) for row in trial.rows] == [("beside", ""), ("good", "0")]


@pytest.mark.usefixtures("scripted")
def test_parts_without_time_are_left_out(settings: Settings) -> None:
    trial = Trial(settings, lambda line: None, total_seconds=1)
    begin = time.monotonic()
    trial.run([part("hangs"), part("good")])
    assert [(row.verdict, row.note) for row in trial.rows] == [(Verdict.LEFT_OUT, "no time was left")] * 2
    assert time.monotonic() - begin < 60


def test_the_catalogue_fits_together() -> None:
    names = [one.name for one in PARTS]
    assert len(set(names)) == len(names)
    for index, one in enumerate(PARTS):
        assert set(one.needs) <= set(names[:index]), f"{one.name} needs a part that comes later"
        assert one.seconds < TOTAL_SECONDS
        assert part_named(one.name) is one
    assert with_needed(None) == PARTS
    assert [one.name for one in with_needed(["fp8", "correctness"])] == ["cpu_numbers", "correctness", "demo", "fp8"]


@pytest.mark.slow
def test_a_real_part_in_a_real_process(settings: Settings) -> None:
    trial = Trial(settings, lambda line: None)
    trial.run(with_needed(["environment"]))
    assert {row.what for row in trial.rows} >= {"device and versions", "page-locked host memory"}
    assert Verdict.FAILED not in {row.verdict for row in trial.rows}
    assert "torch" in trial.rows[0].numbers
    assert Report("x", settings.work / "y").part == "x"
