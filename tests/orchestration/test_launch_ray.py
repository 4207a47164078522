"""A real launch through Ray, the shortest there is, and what Ray then shows of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.schema import DataConfig, ParallelConfig
from megatron_deepstack.testing.tiny import tiny_recipe
from megatron_deepstack.testing.tiny_store import write_tiny_store
from orchestration.launch.driver import run

MARK = "not-to-be-seen"


@pytest.mark.slow
def test_a_run_of_two_ranks_and_nothing_private_in_what_ray_keeps(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ranks get the driver's credentials, and Ray's tables of actors, jobs and tasks do not hold them."""
    monkeypatch.setenv("WANDB_API_KEY", MARK)
    monkeypatch.setenv("NCCL_DEBUG_SUBSYS", "seen")
    recipe = tiny_recipe(parallel=ParallelConfig(pipeline=2))
    recipe = replace(
        recipe,
        run_dir=str(tmp_path / "run"),
        data=DataConfig(store=str(write_tiny_store(tmp_path / "store.zarr"))),
        train=replace(recipe.train, steps=2),
    )
    run.launch(recipe)
    said = " ".join(capsys.readouterr().out.split())
    for words in ("launch: starting Ray on this machine", "checks passed", "launch: starting 2 ranks: workers within"):
        assert words in said
    status = CliRunner().invoke(app, ["status", recipe.run_dir, "--json"])
    found = json.loads(status.output)
    assert (status.exit_code, found["state"], found["step"], len(found["ranks"])) == (0, "finished", 2, 2)
    tables = _what_ray_keeps()
    assert "seen" in tables, "the runtime environment is among what was looked at"
    assert MARK not in tables


def _what_ray_keeps() -> str:
    """All that the head of Ray holds on actors, jobs, tasks and workers, as the dashboard gets it."""
    import ray

    state: Any = ray._private.state.state
    accessor = state._connect_and_get_accessor()
    tables = [
        *accessor.get_actor_table(None, None),
        *accessor.get_job_table(),
        *accessor.get_worker_table(),
        *(one.SerializeToString() for one in state._get_all_task_events()),
    ]
    return b"\n".join(tables).decode("latin-1")
