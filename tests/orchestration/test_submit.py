"""`ray job submit`: commands as jobs of a running cluster, whose address they find by themselves."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from preprocess_jobs import Work, assert_gone

from megatron_deepstack.checkpoint.folder import checkpoint_path, newest_whole
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import DataConfig, ParallelConfig
from megatron_deepstack.testing.tiny import tiny_recipe
from megatron_deepstack.testing.tiny_store import write_tiny_store

RAY = str(Path(sys.executable).with_name("ray"))
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True)
class Head:
    """A running head node."""

    dashboard: str
    environment: dict[str, str]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head node with a dashboard, on loopback, in a folder short enough for the dashboard's sockets (107 bytes)."""
    gcs, dashboard, agent = free_port(), free_port(), free_port()
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    folder = tempfile.mkdtemp(prefix="r")
    start = [
        RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.2", f"--port={gcs}", "--num-cpus=2",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--object-store-memory={80 * 2**20}", f"--temp-dir={folder}",
    ]  # fmt: skip
    process = subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "Ray runtime started" in line:
            break
    else:
        raise AssertionError("".join(said))
    yield Head(f"http://127.0.0.1:{dashboard}", environment)
    started = [*psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    process.communicate(timeout=240)
    for child in started:
        if child.is_running():
            child.kill()
    assert_gone(started)
    shutil.rmtree(folder)


def submitted(command: list[str], head: Head) -> subprocess.CompletedProcess[str]:
    """The job's end, submitted again while the node's agent is still on its way up."""
    for _ in range(20):
        done = subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=240, check=False)
        if "No available agent to submit job" not in done.stderr:
            break
    return done


@pytest.mark.slow
def test_a_submitted_job_makes_the_same_store(
    heavy: Work, head: Head, tmp_path: Path, same_store: Callable[[Path, Path], None]
) -> None:
    store = tmp_path / "store"
    submit = [RAY, "job", "submit", "--address", head.dashboard, "--", *heavy.command(store)]
    done = submitted(submit, head)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"preprocess: {heavy.recipe.parent}/records.json -> {store}" in done.stdout
    report = json.loads((store / "report.json").read_text())
    assert report["nodes"] == {"127.0.0.2": heavy.num_parts}
    same_store(heavy.serial, store)
    other = [*submit, "data.images_per_part=8"]
    refused = submitted(other, head)
    assert refused.returncode != 0
    assert "holds the store of another plan" in refused.stdout


@pytest.mark.slow
def test_a_submitted_launch_trains(head: Head, tmp_path: Path) -> None:
    """The job's driver is a process of the cluster; its ranks are two more."""
    store = write_tiny_store(tmp_path / "store.zarr")
    recipe = tiny_recipe(parallel=ParallelConfig(pipeline=2))
    recipe = replace(
        recipe,
        data=DataConfig(store=str(store)),
        run_dir=str(tmp_path / "run"),
        launch=replace(recipe.launch, ranks=2),
    )
    written = tmp_path / "recipe.yaml"
    written.write_text(recipe_to_yaml(recipe))
    command = [sys.executable, "-m", "megatron_deepstack.cli", "launch", str(written)]
    done = submitted([RAY, "job", "submit", "--address", head.dashboard, "--", *command], head)
    assert done.returncode == 0, done.stdout + done.stderr
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(records) == recipe.train.steps
    newest, _ = newest_whole(recipe.run_dir)
    assert newest is not None
    assert newest.path == checkpoint_path(recipe.run_dir, recipe.train.steps)
