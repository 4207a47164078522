"""The driver of a launched run, the parts that need no cluster."""

from __future__ import annotations

import re
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from launch_cases import demand, node
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import CheckpointConfig, Recipe
from megatron_deepstack.errors import ClusterError, PreemptedError
from orchestration.launch.before.placement import place
from orchestration.launch.driver import run
from orchestration.launch.driver.background import BackgroundCheck, follow
from orchestration.launch.driver.follow import Follower
from orchestration.launch.driver.record import Events, LaunchRecord, read_record
from orchestration.launch.driver.stopping import request_stop


def test_lines_of_rank_0_are_passed_on_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "saved [/runs]/1:100:3 [bold]now[/bold]"
    Follower(tmp_path, LaunchRecord()).say(line)
    assert capsys.readouterr().out == f"{line}\n"


def test_dry_run_without_a_cluster(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is shown as it is and nothing is started; what is wrong is the exit code's matter too."""
    monkeypatch.setattr(socket, "gethostname", lambda: "[b]1:100:3")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_to_yaml(replace(recipe, checkpoint=CheckpointConfig(keep=1))))
    result = CliRunner().invoke(app, ["launch", str(file), "--dry-run"], env={"COLUMNS": "160"})
    assert result.exit_code == ClusterError.exit_code
    for words in (
        "2 ranks",
        "WRONG",
        "store /s",
        "restarts   3 at most",
        "from the beginning",
        "OMP_NUM_THREADS=1",
        "[b]1:100:3",
    ):
        assert words in result.output
    assert "ray" not in {path.name for path in Path(recipe.run_dir).iterdir()}


def test_the_run_is_followed_while_work_takes_long(tmp_path: Path) -> None:
    """Checks of a large cluster take minutes: `status` on another machine must not call the driver lost meanwhile."""
    record = LaunchRecord()
    Events(tmp_path).clear()
    follower = Follower(tmp_path, record)
    told = threading.Event()

    def work() -> str:
        Events(tmp_path).add("waiting", what="two nodes")
        told.wait(60)
        return "done"

    class Waits(Follower):
        def look(self) -> None:
            follower.look()
            if record.waiting_for:
                told.set()

    background = BackgroundCheck("checks", work)
    follow(background, Waits(tmp_path, record), tmp_path, threading.Event())
    assert background.outcome() == "done"
    written = read_record(tmp_path)
    assert written is not None
    assert written.waiting_for == "two nodes"


def test_an_error_of_work_comes_out(tmp_path: Path) -> None:
    def fail() -> None:
        raise ClusterError("3 of 9 checks failed")

    background = BackgroundCheck("checks", fail)
    follow(background, Follower(tmp_path, LaunchRecord()), tmp_path, threading.Event())
    with pytest.raises(ClusterError, match="3 of 9 checks failed"):
        background.outcome()


@pytest.mark.parametrize("asked", ["second signal", "stop --now"])
def test_work_is_left_when_the_run_is_to_end_at_once(tmp_path: Path, asked: str) -> None:
    over, second = threading.Event(), threading.Event()
    if asked == "second signal":
        second.set()
    else:
        request_stop(tmp_path, "stop", how="now")
    try:
        with pytest.raises(PreemptedError, match="ended at once on request"):
            follow(
                BackgroundCheck("checks", lambda: over.wait(60)), Follower(tmp_path, LaunchRecord()), tmp_path, second
            )
    finally:
        over.set()


@pytest.mark.parametrize(
    ("cluster", "num_nodes", "words"),
    [
        ("", 1, "launch: checking this machine"),
        ("10.0.0.1:6379", 1, "checking 1 node; a node's process needs 10 to 30 s to start, at most 6 min in all"),
        ("10.0.0.1:6379", 4, "checking 4 nodes and the links between them; .* at most 12 min in all"),
    ],
)  # fmt: skip
def test_what_is_checked_and_for_how_long(cluster: str, num_nodes: int, words: str) -> None:
    seats = place(demand(8 * num_nodes, tensor=8), [node(number) for number in range(num_nodes)])
    assert re.search(words, run._what_is_checked(LaunchRecord(cluster=cluster), seats))


def test_what_is_waited_for(recipe: Recipe) -> None:
    limited = replace(recipe, health=replace(recipe.health, hang_seconds=600.0))
    said = run._what_is_waited_for(limited, demand(2))
    assert said.startswith("launch: starting 2 ranks: workers within ")
    assert said.endswith("(launch.start_seconds), then weights, checkpoint and the first step, at most 30 min")
    endless = replace(recipe, health=replace(recipe.health, hang_seconds=0.0))
    assert run._what_is_waited_for(endless, demand(2)).endswith("without a limit (health.hang_seconds 0)")
