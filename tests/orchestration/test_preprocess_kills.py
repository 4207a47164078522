"""Killed at any moment, by any signal, on any node: the same command goes on, and the bytes are the same."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from preprocess_jobs import Work, assert_gone, name_of

Same = Callable[[Path, Path], None]

AGENTS = ("ray::DashboardA", "ray::RuntimeEnvA")
"""Names of Ray's agents, as far as the kernel keeps them."""

pytestmark = pytest.mark.slow


def untouched(before: dict[Path, int]) -> bool:
    return all(path.stat().st_mtime_ns == changed for path, changed in before.items())


def finished_files(store: Path) -> dict[Path, int]:
    """Files of parts that have their record, with the time of their last change."""
    records = list(store.glob("parts/images-*.json"))
    shards = [store / f"images/pixels/c/{int(record.stem[-6:])}/0/0/0" for record in records]
    return {path: path.stat().st_mtime_ns for path in (*records, *shards)}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_driver_goes_on_from_what_was_done(heavy: Work, tmp_path: Path, same_store: Same, seed: int) -> None:
    """Killed at random moments until it happens to finish; whatever was recorded is never done again."""
    generator, store, kills = random.Random(seed), tmp_path / "store", 0
    while True:
        with heavy.start(store, "--workers", "0") as command:
            goal = min(heavy.num_parts, len(command.records()) + generator.randint(0, 5))
            command.wait_for(lambda: command.has_begun() and len(command.records()) >= goal)  # noqa: B023
            command.process.kill()
            code, said = command.end()
            done = command.records()
            in_flight = len(list(store.glob("images/pixels/c/*"))) - sum("images" in name for name in done)
            files = finished_files(store)
        if code == 0:
            break
        kills += 1
        assert code == -signal.SIGKILL, said
        assert in_flight <= 1, "more than the one part at work was lost"
        if len(done) == heavy.num_parts:
            break
    with heavy.start(store, "--workers", "0") as command:
        code, said = command.end()
    assert code == 0, said
    assert kills >= 1
    assert untouched(files)
    same_store(heavy.serial, store)


def test_a_second_command_on_the_same_store_is_refused(heavy: Work, tmp_path: Path, same_store: Same) -> None:
    store = tmp_path / "store"
    with heavy.start(store, "--workers", "0") as first:
        first.wait_for(lambda: first.records())
        first.process.send_signal(signal.SIGSTOP)
        with heavy.start(store, "--workers", "0") as second:
            code, said = second.end()
        assert code == 4, said
        holder = f"process {first.process.pid} on {os.uname().nodename}"
        assert f"another preprocessing job is writing this store ({holder})" in " ".join(said.split())
        first.process.send_signal(signal.SIGCONT)
        code, said = first.end()
    assert code == 0, said
    same_store(heavy.serial, store)


@pytest.mark.timeout(900)
def test_kills_and_signals_on_a_local_ray(heavy: Work, tmp_path: Path, same_store: Same) -> None:
    """The same command four times: driver killed, then stopped by SIGTERM and SIGINT, then a worker killed mid-part."""
    store = tmp_path / "store"
    done = 0
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        with heavy.start(store, "--workers", "2") as command:
            command.wait_for(lambda command=command, done=done: len(command.records()) > done and command.writers())
            started = command.descendants()
            assert "raylet" in map(name_of, started)
            if number == signal.SIGKILL:  # Ray's two agents look for their lost head for a minute, then end
                started = [process for process in started if not name_of(process).startswith(AGENTS)]
            command.process.send_signal(number)
            code, said = command.end()
            assert_gone(started)
            files = finished_files(store)
        if number != signal.SIGKILL:
            assert code == 75, said
            assert f"stopped by {number.name}. What is done is kept; the same command goes on from there." in said
            assert "Traceback" not in said
        else:
            assert code == -signal.SIGKILL
        assert done < len(files) // 2 < heavy.num_parts
        done = len(list(store.glob("parts/[a-z]*.json")))
    with heavy.start(store, "--workers", "2") as command:
        os.kill(command.wait_for(command.freeze_writer), signal.SIGKILL)
        code, said = command.end()
    assert code == 0, said
    assert f"{done} of {heavy.num_parts} parts are done already" in said
    assert "its worker died; it is done again" in said, "the fault did not fire"
    report = json.loads((store / "report.json").read_text())
    assert report["parts_done_before"] == done
    assert 1 <= report["parts_done_again"] <= 2
    assert untouched(files)
    same_store(heavy.serial, store)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster on loopback whose head does no work."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0, "node_ip_address": "127.0.0.2", "object_store_memory": 80 * 2**20, "include_dashboard": False
        },
    )  # fmt: skip
    yield made
    made.shutdown()


def add_node(cluster: Any, address: str) -> Any:
    return cluster.add_node(num_cpus=1, node_ip_address=address, object_store_memory=80 * 2**20)


def test_a_node_is_lost_and_another_joins(heavy: Work, cluster: Any, tmp_path: Path, same_store: Same) -> None:
    store = tmp_path / "store"
    node = add_node(cluster, "127.0.0.3")
    with heavy.start(store, "--address", cluster.address) as command:
        command.wait_for(lambda: len(command.records()) >= 2)
        writer = command.wait_for(command.freeze_writer)
        cluster.remove_node(node, allow_graceful=False)
        os.kill(writer, signal.SIGKILL)
        assert len(command.records()) < heavy.num_parts
        add_node(cluster, "127.0.0.4")
        code, said = command.end()
    assert code == 0, said
    report = json.loads((store / "report.json").read_text())
    assert sorted(report["nodes"]) == ["127.0.0.3", "127.0.0.4"]
    assert sum(report["nodes"].values()) == heavy.num_parts
    assert report["nodes"]["127.0.0.3"] >= 2
    assert 1 <= report["parts_done_again"] <= 2, said
    same_store(heavy.serial, store)
