"""The trial's parts at tiny size on the CPU: they run, nothing fails, and only what needs a GPU is left out."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_deepstack.testing.gpu.catalogue import PARTS, part_named
from megatron_deepstack.testing.gpu.report import Report, Row, Settings, Verdict, read_rows
from megatron_deepstack.testing.ranks import RankPool

ROOT = Path(__file__).parents[3]
IN_ONE_PROCESS = tuple(part.name for part in PARTS if part.name not in ("demo", "environment"))
ONLY_ON_A_GPU = ("engine", "stage_engine", "fp8")


def _run_parts(rank: int, names: tuple[str, ...], settings: Settings) -> list[Row]:
    rows = []
    for name in names:
        module, function = part_named(name).function
        file = settings.work / f"{name}.jsonl"
        report = Report(name, file)
        with report.case(f"all of {name}"):
            getattr(importlib.import_module(f"megatron_deepstack.testing.gpu.{module}"), function)(settings, report)
        rows += read_rows(file)
    return rows


@pytest.fixture(scope="module")
def rows(ranks: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Of all parts but the demo's, in one process, which spares the imports."""
    folder = tmp_path_factory.mktemp("trial")
    found: list[Row] = ranks(1).run(_run_parts, IN_ONE_PROCESS, Settings(tiny=True, work=folder, output=folder))[0]
    return found


@pytest.mark.parametrize("name", IN_ONE_PROCESS)
def test_a_part_runs_here(rows: list[Row], name: str) -> None:
    mine = [row for row in rows if row.part == name]
    assert mine
    assert not [(row.what, row.note, *row.traceback) for row in mine if row.verdict is Verdict.FAILED]
    left_out = [row for row in mine if row.verdict is Verdict.LEFT_OUT]
    assert {row.note for row in left_out} <= {"no GPU"}
    assert (len(left_out) == len(mine)) is (name in ONLY_ON_A_GPU)


def test_numbers_that_the_table_promises(rows: list[Row]) -> None:
    by_name = {(row.part, row.what): row.numbers for row in rows}
    stage = by_name["stage_local", "rows of 96"]
    assert set(by_name["stage_local", "rows of 96, unfused"]) == set(stage)
    assert set(by_name["stage_local", "rows of 96, packed, unfused"]) == set(stage)
    assert set(stage) == {"ms", "TFLOPs", "tokens_per_s", "peak_GB", "share_of_ceiling"}
    assert by_name["correctness", "padded, fp32"] == {"loss": 0.0, "gradient": 0.0, "parameter": 0.0}
    assert set(by_name["checkpoint", "save 2"]) == {
        "GB",
        "stall_ms",
        "whole_after_s",
        "step_ms",
        "step_beside_ms",
    }
    assert "views_per_s" in by_name["vision", "tower and projector, frozen"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_command(tmp_path: Path) -> None:
    """`tools/gpu_trial.py --tiny`, the demo included, as it is run."""
    output = tmp_path / "trial"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_trial.py"), str(output), "--tiny", "--seconds", "800"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file.name for file in output.iterdir()} == {"results.json", "table.md", "log.txt", "trace.json.gz"}
    found = json.loads((output / "results.json").read_text())
    assert set(found["seconds"]) == {part.name for part in PARTS}
    assert "0 rows failed" in (output / "table.md").read_text()


def test_the_command_refuses_a_folder_that_holds_files(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_trial.py"), str(tmp_path), "--tiny"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "holds files already; name a new or empty folder" in done.stderr
