"""`status` and `stop`: a run seen and ended from another shell."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import (
    ClusterError,
    ConfigError,
)
from megatron_deepstack.platform.files.run_lock import OWNER_FILE, run_lock
from megatron_deepstack.platform.processes.owner import this_process
from megatron_deepstack.platform.processes.process import process_start, process_ticks
from megatron_deepstack.training.guard.heartbeat import Heartbeats
from orchestration.launch.before.report import status_document, status_text
from orchestration.launch.driver import control
from orchestration.launch.driver.record import (
    STOP_FILE,
    LaunchRecord,
    Restart,
    RunState,
    newest_step,
    read_record,
    write_record,
)
from orchestration.launch.driver.stopping import request_stop, wants_it_now


@pytest.fixture
def running(recipe: Recipe) -> Path:
    """A run in its 10th step of 40, whose driver is this process."""
    run_dir = Path(recipe.run_dir)
    (run_dir / "checkpoints" / "step_00000006").mkdir(parents=True)
    (run_dir / "checkpoints" / "step_00000009.partial").mkdir()
    long = replace(recipe, train=replace(recipe.train, steps=40))
    (run_dir / "recipe.yaml").write_text(recipe_to_yaml(long))
    lines = [{"step": n, "loss": 1 / n, "tokens_per_second": 100 * n, "step_seconds": 2.0} for n in range(1, 11)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "metrics.jsonl").write_text(text + '{"step": 11, "lo')
    record = LaunchRecord(state=RunState.RUNNING, num_ranks=2, max_failures=3)
    record.restarts.append(Restart(time.time(), "rank 1 (pid 5 on host) died: killed", (1,)))
    write_record(run_dir, record)
    return run_dir


def changed(run_dir: Path, **changes: object) -> None:
    record = read_record(run_dir)
    assert record is not None
    for name, value in changes.items():
        setattr(record, name, value)
    write_record(run_dir, record)


class TestControl:
    def test_status_of_a_running_run(self, running: Path) -> None:
        found = control.status_of(running)
        assert (found.state, found.num_steps, found.checkpoint, found.exit_code) == ("running", 40, 6, 0)
        assert found.seconds_left == 60.0
        text = status_text(found)
        assert "step       10 of 40, loss 0.1000, 1,000 tokens/s, 1 min 0 s left" in text
        assert "checkpoint after step 6" in text
        assert "restarts   1 of at most 3" in text
        assert "rank 1 (pid 5 on host) died: killed" in text
        assert newest_step(running) == 6

    @pytest.mark.parametrize(
        ("changes", "code", "words"),
        [
            ({"state": RunState.FINISHED, "exit_code": 0, "outcome": "finished"}, 0, "finished"),
            ({"state": RunState.STOPPED, "exit_code": 75, "outcome": "asked to stop"}, 75, "because    asked to stop"),
            ({"state": RunState.FAILED, "exit_code": 7, "outcome": "rank 0 died"}, 7, "because    rank 0 died"),
            ({"host": "elsewhere", "machine": "elsewhere"}, 0, "running"),
        ],
    )
    def test_status_leaves_with_the_runs_own_code(
        self, running: Path, changes: dict[str, object], code: int, words: str
    ) -> None:
        changed(running, **changes)
        result = CliRunner().invoke(app, ["status", str(running)], env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output
        assert words in result.output

    def test_status_of_a_run_whose_driver_is_gone(self, running: Path) -> None:
        changed(running, pid=2**22 + 1)
        result = CliRunner().invoke(app, ["status", str(running)])
        assert (result.exit_code, "lost" in result.output) == (1, True)

    def test_status_of_a_run_of_train(self, running: Path) -> None:
        """Who works there, since when, and what rank 0 does; then that nobody does any more."""
        (running / "launch.json").unlink()
        beats = Heartbeats(running, 0, 1)
        beats.write("step 11")
        beats.close()
        with run_lock(running, "train", print):
            result = CliRunner().invoke(app, ["status", str(running)], env={"COLUMNS": "200"})
            assert result.exit_code == 0, result.output
            for words in (
                f"{running}: running", f"started by train: process {os.getpid()} on {socket.gethostname()}, since 2",
                f"ranks      1 on {socket.gethostname()}; rank 0 in step 11", "step       10 of 40",
            ):  # fmt: skip
                assert words in result.output
            words = rf"not started by `launch`; `kill {os.getpid()}` on {socket.gethostname()} to stop it"
            with pytest.raises(ConfigError, match=words):
                control.stop(running, now=False, wait_seconds=0)
        result = CliRunner().invoke(app, ["status", str(running)], env={"COLUMNS": "200"})
        assert (result.exit_code, "not running" in result.output) == (0, True)
        assert "started by train or torchrun, not `launch`; no process works in the folder now" in result.output
        with pytest.raises(ConfigError, match="not started by `launch`; send SIGTERM"):
            control.stop(running, now=False, wait_seconds=0)

    @pytest.mark.parametrize(
        ("changes", "state"),
        [
            ({}, "running"),
            ({"ticks": 1}, "lost"),
            ({"machine": "elsewhere"}, "running"),
            ({"machine": "elsewhere", "age": 3600.0}, "lost"),
        ],
        ids=["here", "here, killed", "elsewhere", "elsewhere, killed"],
    )
    def test_status_of_a_run_of_train_by_its_owner(self, running: Path, changes: dict[str, Any], state: str) -> None:
        """A launch before it, in the same folder, is over and tells nothing of this one."""
        changed(running, state=RunState.FAILED, outcome="an earlier launch", exit_code=7)
        age = changes.pop("age", 0.0)
        owner = replace(this_process("torchrun"), **changes)
        (running / OWNER_FILE).write_text(json.dumps(asdict(owner)))
        os.utime(running / OWNER_FILE, (time.time() - age, time.time() - age))
        found = control.status_of(running)
        assert (found.state, found.launcher, found.exit_code) == (state, "torchrun", int(state == "lost"))
        if "ticks" in changes:  # its process id may be another's by now
            said = control.stop(running, now=True, wait_seconds=0)
            assert said == f"nothing to stop: its torchrun (process {os.getpid()} on {owner.host}) is gone"
            return
        with pytest.raises(ConfigError, match=rf"not started by `launch`; `kill {os.getpid()}` on"):
            control.stop(running, now=True, wait_seconds=0)

    def test_status_and_stop_where_a_run_is_about_to_write_its_recipe(self, tmp_path: Path) -> None:
        """Until models are built, and where a file or nothing is in the place of a run."""
        with run_lock(tmp_path / "run", "train", print):
            assert control.status_of(tmp_path / "run").state == "starting"
            with pytest.raises(ConfigError, match=rf"`kill {os.getpid()}` on"):
                control.stop(tmp_path / "run", now=False, wait_seconds=0)
        (tmp_path / "file").write_text("x")
        for name in ("run", "file", "nothing"):
            with pytest.raises(ConfigError, match="no run is there"):
                control.stop(tmp_path / name, now=False, wait_seconds=0)

    @pytest.mark.parametrize(
        ("driver", "seconds", "launcher"),
        [
            ({"state": RunState.STOPPED, "exit_code": 75}, 1.0, "train or torchrun"),
            ({"state": RunState.STOPPED, "exit_code": 75}, -1.0, "launch"),
            ({"pid": 2**22 + 1}, 3600.0, "train or torchrun"),
            ({"pid": 2**22 + 1}, 1.0, "launch"),
        ],
        ids=["stopped, then trained", "stopped", "killed, then trained", "killed"],
    )
    def test_status_after_a_train_that_followed_a_launch(
        self, running: Path, driver: dict[str, Any], seconds: float, launcher: str
    ) -> None:
        """What the launch ended with is no longer true of the run; told by which of the two wrote last."""
        changed(running, **driver)
        last = (running / "launch.json").stat().st_mtime + seconds
        os.utime(running / "recipe.yaml", (last, last))
        line = {"step": 40, "loss": 0.1, "tokens_per_second": 1.0, "step_seconds": 2.0}
        (running / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        found = control.status_of(running)
        assert (found.launcher, found.state == "finished") == (launcher, launcher != "launch")
        assert (found.exit_code == 0) is (launcher != "launch")

    def test_status_of_a_finished_run_of_train(self, running: Path) -> None:
        (running / "launch.json").unlink()
        line = {"step": 40, "loss": 0.1, "tokens_per_second": 1.0, "step_seconds": 2.0}
        (running / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        assert control.status_of(running).state == "finished"

    def test_status_as_json(self, running: Path) -> None:
        result = CliRunner().invoke(app, ["status", str(running), "--json"])
        found = json.loads(result.output)
        expected = {
            "run_dir": str(running), "state": "running", "launcher": "launch", "step": 10, "num_steps": 40, "loss": 0.1,
            "tokens_per_second": 1000, "seconds_left": 60.0, "checkpoint": 6, "max_failures": 3, "exit_code": 0,
            "cluster": None, "because": "", "waiting_for": "", "ranks": [],
        }  # fmt: skip
        assert {name: found[name] for name in expected} == expected
        assert found["driver"] == {"host": socket.gethostname(), "pid": os.getpid(), "since": process_start()}
        assert [one["reason"] for one in found["restarts"]] == ["rank 1 (pid 5 on host) died: killed"]

    def test_json_of_a_run_that_has_not_begun(self, running: Path) -> None:
        (running / "launch.json").unlink()
        (running / "metrics.jsonl").unlink()
        found = status_document(control.status_of(running))
        assert (found["step"], found["loss"], found["driver"], found["ranks"]) == (0, None, None, [])

    def test_json_holds_no_number_that_json_has_not(self, running: Path) -> None:
        line = '{"step": 3, "loss": null, "tokens_per_second": 1.0, "step_seconds": 2.0}\n'
        (running / "metrics.jsonl").write_text(line)
        assert status_document(control.status_of(running))["loss"] is None

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no run is there"):
            control.status_of(tmp_path)

    def test_stop_leaves_a_request_and_says_when_it_is_not_met(self, running: Path) -> None:
        with pytest.raises(ClusterError, match=r"still running after 0 s; wait on, or `stop .* --now`"):
            control.stop(running, now=False, wait_seconds=0)
        assert json.loads((running / STOP_FILE).read_text())["how"] == "save"
        assert not wants_it_now(running)
        request_stop(running, "test", how="now")
        assert wants_it_now(running)

    def test_stop_of_a_run_that_is_over(self, running: Path) -> None:
        changed(running, state=RunState.FINISHED, outcome="finished")
        assert control.stop(running, now=False, wait_seconds=9) == "nothing to stop: finished, finished"
        changed(running, state=RunState.RUNNING, pid=2**22 + 1)
        assert "its driver (pid 4194305" in control.stop(running, now=True, wait_seconds=9)
        assert not (running / STOP_FILE).exists()

    def test_stop_now_kills_a_driver_that_does_not_answer(self, running: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as driver:
            changed(running, pid=driver.pid, pid_ticks=process_ticks(driver.pid))
            said = control.stop(running, now=True, wait_seconds=0.1)
            assert driver.wait(200) == -9
        assert f"its driver (pid {driver.pid} on {socket.gethostname()}) had not ended after 0 s and was killed" in said

    def test_stop_now_spares_a_stranger_with_the_drivers_number(self, running: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
            changed(running, pid=stranger.pid, pid_ticks=process_ticks(stranger.pid) - 3600)
            assert control.status_of(running).state == "lost"
            said = control.stop(running, now=True, wait_seconds=0.1)
            assert f"its driver (pid {stranger.pid} on {socket.gethostname()}) is gone" in said
            assert stranger.poll() is None
            stranger.communicate(b"\n")
        assert stranger.returncode == 0

    def test_stop_now_of_a_driver_of_another_container_of_that_name(self, running: Path) -> None:
        changed(running, machine="another")
        with pytest.raises(ClusterError, match=rf"has not ended after 0 s; `kill -9 {os.getpid()}` there"):
            control.stop(running, now=True, wait_seconds=0)

    def test_stop_now_of_a_driver_that_ends_at_that_moment(
        self, running: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        killed = []

        def kill(pid: int, number: int) -> None:
            killed.append((pid, number))
            raise ProcessLookupError

        monkeypatch.setattr(control.os, "kill", kill)
        assert control.stop(running, now=True, wait_seconds=0).endswith("is gone")
        assert killed == [(os.getpid(), signal.SIGKILL)]
