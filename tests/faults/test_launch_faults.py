"""Faults of a gang on a Ray cluster of two nodes on this machine: what is found, what is said, and that the losses
afterwards are the undisturbed run's, bit for bit."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fault_runs
import psutil
import pytest
from fault_runs import DEADLINE_SECONDS, TrainCommand, course_of, fault_recipe, last_step, resumed_after
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import CheckpointError, PreemptedError, RankError
from megatron_deepstack.testing.ranks import RankPool
from orchestration.cluster import import_ray
from orchestration.launch.driver.record import read_record

Pools = Callable[[int], RankPool]
RecordFault = Callable[..., None]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # two or three starts of Ray ranks each
STEPS, INTERVAL = 150, 10


class LaunchCommand(TrainCommand):
    """`megatron-deepstack launch`, running."""

    verb = "launch"

    def until_saved(self) -> int:  # type: ignore[override]
        """Wait for a checkpoint, and a step after it; the newest step then."""
        self.until_said(r"saved .*step_\d+")
        (first, *_) = re.findall(r"saved .*step_(\d+)", self.text)
        return self.until_step(int(first) + 1)


class Cluster:
    """Two nodes of one slot each, on addresses of the loopback interface."""

    def __init__(self) -> None:
        import_ray(None)
        from ray.cluster_utils import Cluster as RayCluster

        for tries_left in (2, 1, 0):
            self._cluster: Any = RayCluster()
            try:
                self._add("127.0.0.2", include_dashboard=False)
                self.second: Any = self._add("127.0.0.3")
                return
            except Exception as error:  # Ray has no class for it
                self._cluster.shutdown()
                if not tries_left or "timed out during startup" not in str(error):
                    raise  # Ray waits 30 s for a node, and on a busy machine the first one may need longer

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def _add(self, address: str, **settings: object) -> Any:
        return self._cluster.add_node(num_cpus=1, node_ip_address=address, object_store_memory=100 << 20, **settings)

    def kill_second(self) -> None:
        """End a node at once, with all its processes."""
        self._cluster.remove_node(self.second, allow_graceful=False)

    def take_back_second(self) -> None:
        """Announce the end of a node, as clouds do with spot instances a minute or two before; another one is there."""
        import ray
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
        deadline = int((time.time() + DEADLINE_SECONDS) * 1000)
        leaving, self.second = self.second, self._add("127.0.0.4")
        client = ray._raylet.GcsClient(address=self.address)  # type: ignore[attr-defined]
        accepted, why_not = client.drain_node(leaving.node_id, reason, "test", deadline)
        assert accepted, why_not

    def bring_back_second(self) -> None:
        """Another node in its place."""
        self.second = self._add("127.0.0.3")

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    started = Cluster()
    yield started
    started.close()


@pytest.fixture(scope="module")
def undisturbed(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe of a finished run without faults."""
    recipe = fault_recipe(tmp_path_factory.mktemp("launch"), steps=STEPS, interval=INTERVAL)
    ranks(2).run(fault_runs.train_on_rank, recipe)
    assert last_step(recipe.run_dir) == STEPS
    return recipe


def in_folder(recipe: Recipe, folder: Path, **launch: Any) -> Recipe:
    """The same run in another folder, launched in another way."""
    return replace(recipe, run_dir=str(folder / "run"), launch=replace(recipe.launch, **launch))


def wait_for(came: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not came():
        assert time.monotonic() < deadline, f"no {what} in time"
        time.sleep(0.05)


def test_a_killed_rank(cluster: Cluster, undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault) -> None:
    """The gang starts again by itself; the reason is told once, with rank, process and machine."""
    recipe = in_folder(undisturbed, tmp_path)
    with LaunchCommand(recipe, "--address", cluster.address) as command:
        command.until_saved()
        pid = command.pid(1)
        done = command.hit(1, signal.SIGKILL)
        seconds = command.until_said(r"Restart 1 of at most 3")
        assert command.end() == 0
    assert f"rank 1 (pid {pid} on {os.uname().nodename}) died: its process was killed or crashed" in command.text
    assert command.text.count("died") == 1
    assert "(raylet)" not in command.text
    assert "attempt 1, rank 0 on" in command.text
    assert course_of(recipe.run_dir) == course_of(undisturbed.run_dir)
    (resumed,) = resumed_after(command.text)
    record = read_record(Path(recipe.run_dir))
    assert record is not None
    assert [(one.address, one.rank) for one in record.ranks] == [("127.0.0.2", 0), ("127.0.0.3", 1)]
    record_fault(
        fault="kill -9 of a rank on a Ray cluster",
        found_after=f"{seconds:.1f} s",
        lost_steps=done - resumed,
        outcome="gang restarted by itself, same losses",
    )


def test_no_restarts_left_then_the_driver_killed(
    cluster: Cluster, undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault
) -> None:
    """Each time the same command goes on; no rank outlives its driver."""
    recipe = in_folder(undisturbed, tmp_path, max_failures=0)
    options = ("--address", cluster.address)
    with LaunchCommand(recipe, *options) as first:
        first.until_saved()
        done = first.hit(0, signal.SIGKILL)
        assert first.end() == RankError.exit_code
    assert "All 0 restarts (launch.max_failures) are used up; the same command goes on" in " ".join(first.text.split())
    with LaunchCommand(recipe, *options) as second:
        second.until_saved()
        record = read_record(Path(recipe.run_dir))
        assert record is not None
        pids = [one.pid for one in record.ranks]
        assert all(map(psutil.pid_exists, pids))
        second.process.kill()
        second.process.wait()
        killed_at = last_step(recipe.run_dir)
    wait_for(lambda: not any(map(psutil.pid_exists, pids)), "end of the ranks")
    status = CliRunner().invoke(app, ["status", recipe.run_dir])
    assert (status.exit_code, "lost" in status.output) == (1, True)
    with LaunchCommand(recipe, *options) as third:
        assert third.end() == 0
    assert course_of(recipe.run_dir) == course_of(undisturbed.run_dir)
    lost = {"rank": done - resumed_after(second.text)[0], "driver": killed_at - resumed_after(third.text)[0]}
    record_fault(
        fault="kill -9 of a rank, no restarts left",
        found_after="at once",
        lost_steps=lost["rank"],
        outcome="ended with the rank named; the same command went on, same losses",
    )
    record_fault(
        fault="kill -9 of the Ray driver",
        found_after="at once",
        lost_steps=lost["driver"],
        outcome="ranks ended too; the same command went on, same losses",
    )


def test_a_lost_node(cluster: Cluster, undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault) -> None:
    """The gang waits for another node and goes on there."""
    recipe = in_folder(undisturbed, tmp_path)
    with LaunchCommand(recipe, "--address", cluster.address) as command:
        command.until_saved()
        cluster.kill_second()
        done = last_step(recipe.run_dir)
        seconds = command.until_said(r"Restart 1 of at most 3")
        command.until_said(r"waiting: 2 ranks need 2 x 1 CPU; 1 are missing: 127.0.0.2 has 0 GPUs and 1 CPUs")
        cluster.bring_back_second()
        assert command.end() == 0
    assert "rank 1 (pid" in command.text
    assert course_of(recipe.run_dir) == course_of(undisturbed.run_dir)
    (resumed,) = resumed_after(command.text)
    record_fault(
        fault="a node killed",
        found_after=f"{seconds:.1f} s",
        lost_steps=done - resumed,
        outcome="waited for another node, restarted by itself, same losses",
    )


def test_a_node_is_taken_back(cluster: Cluster, undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault) -> None:
    """With notice: all ranks save first, so no step is lost, and no restart of the budget is used."""
    recipe = in_folder(undisturbed, tmp_path, max_failures=0)
    with LaunchCommand(recipe, "--address", cluster.address) as command:
        command.until_saved()
        cluster.take_back_second()
        seconds = command.until_said(r"a node was taken back, and the ranks saved before that; going on on other nodes")
        assert command.end() == 0
    assert course_of(recipe.run_dir) == course_of(undisturbed.run_dir)
    record = read_record(Path(recipe.run_dir))
    assert record is not None
    assert [one.address for one in record.ranks] == ["127.0.0.2", "127.0.0.4"]
    before = command.text.partition("a node was taken back")[0]
    done = int(re.findall(r"step +(\d+)/", before)[-1])
    assert resumed_after(command.text) == [done]
    record_fault(
        fault="a node taken back with notice",
        found_after=f"{seconds:.1f} s",
        lost_steps=0,
        outcome="saved, went on on another node, same losses",
    )


def test_on_this_machine(undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault) -> None:
    """Without a cluster: no one else can reach it, `stop` saves, a mistake is told once and not retried."""
    recipe = in_folder(undisturbed, tmp_path)
    with LaunchCommand(recipe) as command:
        command.until_saved()
        assert open_to_others(command.process.pid) == []
        stop = CliRunner().invoke(app, ["stop", recipe.run_dir])
        assert stop.exit_code == 0, stop.output
        assert command.end() == PreemptedError.exit_code
    saved = last_step(recipe.run_dir)
    assert f"stopped: asked to stop: saved after step {saved}" in stop.output
    other = replace(recipe, train=replace(recipe.train, seed=7))
    with LaunchCommand(other) as refused:
        assert refused.end() == CheckpointError.exit_code
    assert refused.text.count("train.seed: 1234 in the checkpoint, 7 in the recipe") == 1
    assert "Restart" not in refused.text
    with LaunchCommand(recipe) as rest:
        assert rest.end() == 0
    assert course_of(recipe.run_dir) == course_of(undisturbed.run_dir)
    record_fault(
        fault="`stop` from another shell",
        found_after="at the next step",
        lost_steps=saved - resumed_after(rest.text)[0],
        outcome="saved, exit code 75; the same command went on, same losses",
    )
    record_fault(
        fault="the recipe of another model on a launched run",
        found_after="before the first step",
        lost_steps=0,
        outcome="refused with the differences, not retried",
    )


def open_to_others(pid: int) -> list[str]:
    """Listening sockets of a process and all below it that can be reached from other machines."""
    found = []
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        for socket in process.net_connections("inet"):
            if socket.status == psutil.CONN_LISTEN and not socket.laddr.ip.startswith(("127.", "::1", "::ffff:127.")):
                found.append(f"{process.name()} on {socket.laddr.ip}:{socket.laddr.port}")
    return found
