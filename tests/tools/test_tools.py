"""Every tool answers `--help` and runs to its end at its smallest size, so that none is left behind by a change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted(file.stem for file in (ROOT / "tools").glob("*.py"))
WRITERS = ("benchmarks_page", "golden_recipes", "layout_page", "options_page", "recipe_schema")
"""They write files of this repository, and only compare with `--check`."""
SMALLEST = {
    "bench_balance": ["--steps=2", "--large-steps=1"],
    "bench_checkpoint": ["--ranks=1", "--repeats=1", "--hidden=64", "--layers=4"],
    "bench_cli": ["--repeats=1"],
    "bench_generate": ["--sizes=tiny", "--batches=1", "--prompt=4", "--new=4", "--repeats=1"],
    "bench_head": ["--repeats=1", "--vocabulary=512", "--length=64"],
    "bench_injection": ["--repeats=1", "--hidden=64"],
    "bench_placement": ["--repeats=1", "--micro-batches=2"],
    "bench_plan": ["--repeats=1", "--pairs=1", "--rank-pairs=1"],
    "bench_planning": ["--samples=2"],
    "bench_preprocess": ["--rounds=1", "--images=8"],
    "bench_speed": ["--rounds=1", "--cases=0", "--width=64"],
    "bench_reader": ["--images=2", "--mixed=2", "--rounds=1", "--reads=1"],
}
"""Arguments for the least work of a benchmark."""
ALONE = sorted(set(TOOLS) - {*WRITERS, *SMALLEST})
"""Tools that no test runs as programs of their own but to explain themselves."""
EXPLAIN = """
import contextlib, io, json, runpy, sys
said = {}
for tool in sys.argv[1:]:
    sys.argv, written = [tool, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(written):
            runpy.run_path(f"tools/{tool}.py", run_name="__main__")
    except SystemExit as end:
        said[tool] = (end.code or 0, written.getvalue())
print(json.dumps(said))
"""
"""A program that lets many tools explain themselves, so that what they import is imported once."""

pytestmark = pytest.mark.slow


def run(tool: str, *arguments: str) -> str:
    """What a tool prints; it must end with 0."""
    return run_python(f"tools/{tool}.py", *arguments)


def run_python(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def explained() -> dict[str, list[Any]]:
    """Exit code and words of each tool that other tests run as a program."""
    found: dict[str, list[Any]] = json.loads(run_python("-c", EXPLAIN, *WRITERS, *SMALLEST).splitlines()[-1])
    return found


@pytest.mark.parametrize("tool", [*WRITERS, *SMALLEST])
def test_it_explains_itself(explained: dict[str, list[Any]], tool: str) -> None:
    code, said = explained[tool]
    assert code == 0
    assert said.startswith("usage: ")


@pytest.mark.parametrize("tool", ALONE)
def test_it_explains_itself_as_a_program(tool: str) -> None:
    assert run(tool, "--help").startswith("usage: ")


@pytest.mark.parametrize("tool", WRITERS)
def test_what_a_writer_writes_is_current(tool: str) -> None:
    run(tool, "--check")


@pytest.mark.parametrize("tool", SMALLEST)
def test_a_benchmark_runs_at_its_smallest_size(tool: str) -> None:
    assert json.loads(run(tool, *SMALLEST[tool]).splitlines()[-1])


def test_every_tool_is_run() -> None:
    """Those that need a GPU, or another package's data sets, explain themselves only."""
    assert {tool for tool in TOOLS if not tool.startswith(("gpu_", "paper_"))} == {*WRITERS, *SMALLEST}
