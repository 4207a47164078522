"""The driver of a launched run, the parts that need no cluster."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import CheckpointConfig, Recipe
from megatron_deepstack.errors import (
    ClusterError,
)
from orchestration.launch.driver.follow import Follower
from orchestration.launch.driver.record import (
    LaunchRecord,
)
from orchestration.launch.driver.run import rank_environment


def test_variables_that_ranks_get() -> None:
    given = {"NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "0", "HOME": "/root", "OMP_NUM_THREADS": "4", "RANK": "3"}
    assert rank_environment(given) == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


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
