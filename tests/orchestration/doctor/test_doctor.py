"""`doctor`: broken and hanging libraries are lines of its list, and what is lacking decides how it leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from orchestration.doctor import examine, host
from orchestration.doctor.examine import Outcome, run_probe
from orchestration.doctor.finding import Finding, State

ENDINGS = {
    "answers": ("print('noise'); print('{\"version\": \"1\"}')", {"version": "1"}, ""),
    "raises": ("raise ImportError('libx.so: undefined symbol')", None, "ImportError: libx.so: undefined symbol"),
    "crashes": (
        "import os, sys; print('trying zarr', file=sys.stderr, flush=True); os.abort()",
        None,
        "killed by SIGABRT while trying zarr",
    ),
    "ends in silence": ("raise SystemExit(3)", None, "ended with exit code 3 and without a word"),
}


@pytest.mark.parametrize(("code", "facts", "fault"), ENDINGS.values(), ids=ENDINGS)
def test_however_a_probe_ends_there_is_an_outcome(code: str, facts: dict[str, str] | None, fault: str) -> None:
    assert run_probe([sys.executable, "-c", code], 60) == Outcome(facts, fault)


def test_a_probe_that_hangs_is_ended() -> None:
    outcome = run_probe([sys.executable, "-c", "import time; time.sleep(600)"], 0.5)
    assert outcome.fault.startswith("no answer within")


TORCH = {"torch": "2.13.0", "cuda": "13.0", "nccl": "2.28.3", "devices": [["NVIDIA H100", 85e9]]}
CASES = {
    "all is well": ({"torch": Outcome(TORCH)}, {}, 0),
    "torch broken": ({"torch": Outcome(fault="killed by SIGSEGV while starting")}, {"torch": "lacking"}, 1),
    "a library broken": (
        {"libraries": Outcome({"broken": {"zarr": "ImportError: numcodecs"}})},
        {"libraries": "lacking"},
        1,
    ),
    "Megatron broken": ({"megatron": Outcome(fault="no module")}, {"Megatron-Core": "lacking"}, 1),
    "no NCCL": ({"torch": Outcome({**TORCH, "nccl": ""})}, {"NCCL": "lacking"}, 1),
    "Ray does not start": ({"ray": Outcome(fault="timed out")}, {"Ray": "note"}, 0),
}


@pytest.mark.parametrize(("outcomes", "states", "code"), CASES.values(), ids=CASES)
def test_what_is_lacking_decides_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, Outcome], states: dict[str, str], code: int
) -> None:
    good = {
        "libraries": Outcome({"broken": {}}),
        "torch": Outcome(TORCH),
        "megatron": Outcome({"version": "0.16.1"}),
        "ray": Outcome({"version": "2.60", "folder": "/tmp/ray"}),
    }
    monkeypatch.setattr(examine, "_probe", lambda name, deadline: {**good, **outcomes}[name])
    monkeypatch.setattr(examine, "find_spec", lambda name: None)
    monkeypatch.setattr(examine, "look", lambda folder: iter([Finding("Python", State.GOOD, "3.11")]))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    document = json.loads(result.stdout)
    assert (result.exit_code, document["ready"]) == (code, not code)
    found = {one["subject"]: one for one in document["findings"]}
    assert {name: found[name]["state"] for name in states} == states
    assert all(found[name]["advice"] for name in states), "what is not good comes with what to do"
    assert found["Transformer Engine"]["state"] == ("note" if "GPUs" in found else "good")
    plain = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert plain.exit_code == code
    assert all(f"{name}: " in plain.output for name in found)


def test_apex_of_the_package_index_is_told_apart() -> None:
    finding = examine._optional("Apex", Outcome(fault="ModuleNotFoundError: apex.optimizers"), gpus=True)
    assert (finding.state, "another project" in finding.advice) == (State.NOTE, True)


def test_this_machine(tmp_path: Path) -> None:
    found = {finding.subject: finding for finding in host.look(tmp_path)}
    assert {"Python", "packages", "CPU cores", "memory", "shared memory", "file locks", "open files"} <= set(found)
    assert str(tmp_path) in found["disk for runs"].found


def test_versions_that_are_not_supported_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "requires", lambda name: ["torch>=2.6", "zarr>=99", "no-such-thing", "x; extra == 'gpu'"])
    found = {finding.subject: finding for finding in host._packages()}
    assert found["package zarr"].state is State.LACKING
    assert "pip install --constraint constraints.txt 'zarr>=99'" in found["package zarr"].advice
    assert found["package no-such-thing"].found == "not installed"
    assert "torch" in found["packages"].found
    assert "package x" not in found


@pytest.mark.parametrize(
    ("value", "state"), [(None, State.GOOD), ("1", State.GOOD), ("4096", State.NOTE), ("many", State.NOTE)]
)
def test_threads(monkeypatch: pytest.MonkeyPatch, value: str | None, state: State) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert host._threads().state is state


def test_a_folder_that_cannot_be_written_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    runs, temporary = host._disks(Path("/proc"))
    assert (runs.state, temporary.state) == (State.LACKING, State.LACKING)
    assert "with TMPDIR" in temporary.advice
