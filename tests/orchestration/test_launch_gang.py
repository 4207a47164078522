"""What of Ray Train is used how: the settings, its errors in our words, and mistakes that end its control loop."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_deepstack.config.schema import LaunchConfig, ParallelConfig
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.testing.tiny import tiny_recipe
from orchestration.cluster import import_ray
from orchestration.launch.before.placement import Demand, Node
from orchestration.launch.driver.record import STOP_FILE, Events
from orchestration.launch.driver.run import ray_train_settings
from orchestration.launch.driver.stopping import is_for_a_node, request_stop
from orchestration.launch.gang.policy import End
from orchestration.launch.gang.rank import RankFailed, RankTask

DEMAND = Demand(4, ParallelConfig(tensor=2, pipeline=2), 3, True)
PLACES = ["pid 10 on a", "pid 11 on a", "pid 12 on b", "pid 13 on b"]


@pytest.fixture
def gang(tmp_path: Path) -> Any:
    """A gang in a run folder of its own, as in Ray Train's controller, four ranks at work."""
    import_ray(None)
    from orchestration.launch.gang.callback import GangCallback

    Events(tmp_path).clear()
    made = GangCallback(DEMAND, tmp_path, 0.0)
    made.workers_for_test = [_worker(rank) for rank in range(4)]
    made.after_worker_group_start(SimpleNamespace(get_workers=lambda: made.workers_for_test))
    return made


def _worker(rank: int) -> SimpleNamespace:
    metadata = SimpleNamespace(hostname="ab"[rank // 2], node_ip=f"10.0.0.{rank // 2}", pid=10 + rank)
    return SimpleNamespace(metadata=metadata)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Events(folder).path.read_text().splitlines()]


def state(name: str, **facts: object) -> Any:
    return type(name, (SimpleNamespace,), {})(**facts)


def test_the_trainer(tmp_path: Path) -> None:
    """The budget is the recipe's; each rank asks for a GPU with its CPUs, and for a node of its own choosing."""
    import_ray(None)
    from orchestration.launch.gang.trainer import gang_trainer

    launching = LaunchConfig(max_failures=5, start_seconds=120.0, storage=str(tmp_path / "shared"))
    recipe = replace(tiny_recipe(), launch=launching)
    trainer = gang_trainer(RankTask(recipe, "/", None), tmp_path, DEMAND, {"OMP_NUM_THREADS": "1"}, 30.0)
    assert trainer.run_config.failure_config.max_failures == 5
    assert trainer.run_config.failure_config.controller_failure_limit == 4 + 5
    assert trainer.run_config.failure_config.max_preemption_failures == -1
    assert trainer.run_config.storage_path == str(tmp_path / "shared")
    assert trainer.run_config.worker_runtime_env == {"env_vars": {"OMP_NUM_THREADS": "1"}}
    assert trainer.scaling_config.num_workers == 4
    assert trainer.scaling_config.resources_per_worker == {"CPU": 3, "GPU": 1}
    assert trainer.scaling_config.label_selector == [{}, {}, {}, {}]


def test_settings_of_ray_train() -> None:
    """Ray calls a worker dead only after our own watchdog has had its time."""
    recipe = tiny_recipe()
    recipe = replace(recipe, health=replace(recipe.health, hang_seconds=1000.0))
    assert float(ray_train_settings(recipe)["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"]) == 1600.0


def test_ranks_are_pinned_to_nodes(gang: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of two on nodes with three and two free slots: no group is split."""
    nodes = (Node("x", "10.0.0.2", "x", 2, 64), Node("y", "10.0.0.1", "y", 3, 64))
    monkeypatch.setattr("orchestration.launch.gang.callback.nodes_now", lambda free: nodes)
    labels: list[dict[str, str]] = [{}, {}, {}, {}]
    gang.before_worker_group_start(SimpleNamespace(label_selector=labels))
    assert [label["ray.io/node-id"] for label in labels] == ["y", "y", "x", "x"]


def test_errors_of_ray_in_our_words(gang: Any) -> None:
    from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

    from orchestration.launch.gang.callback import failures_of

    lost_node = RayActorError(error_msg="The actor died because its node has died. Node Id: 1.")
    found = failures_of(
        {
            0: WorkerHealthCheckFailedError("check", ActorDiedError()),
            1: WorkerHealthCheckFailedError("check", lost_node),
            2: WorkerHealthCheckTimeoutError("hanging"),
            3: RankFailed("pid 13 on b", "RuntimeError", "RuntimeError: [gloo] Connection reset by peer", None),
        },
        PLACES,
    )
    assert [one.end for one in found] == [End.DIED, End.NODE_DIED, End.SILENT, End.CUT_OFF]
    assert [one.where for one in found] == PLACES
    (starved,) = failures_of({0: WorkerHealthCheckFailedError("check", OutOfMemoryError("x"))}, PLACES)
    assert "ran out of memory" in starved.text


def failed(**errors: Exception) -> Any:
    """Ray Train's state when it is about to start again after `rank_N=` failures."""
    by_rank = {int(name.removeprefix("rank_")): error for name, error in errors.items()}
    return state("RestartingState", training_failed_error=SimpleNamespace(worker_failures=by_rank))


def test_a_death_is_written_down_and_retried(gang: Any, tmp_path: Path) -> None:
    from ray.exceptions import ActorDiedError

    cut_off = RankFailed("pid 10 on a", "RuntimeError", "Connection closed by peer", None)
    gang.after_controller_state_update(state("RunningState"), failed(rank_2=ActorDiedError(), rank_0=cut_off))
    last = events(tmp_path)[-1]
    assert (last["event"], last["ranks"]) == ("failure", [2])
    assert last["reason"].startswith("rank 2 (pid 12 on b) died: ")
    assert last["reason"].endswith("; rank 0 failed with it")


def test_a_mistake_ends_the_control_loop(gang: Any, tmp_path: Path) -> None:
    from orchestration.launch.gang.callback import RunEnded

    mistake = RankFailed("pid 11 on a", "CheckpointError", "another model", CheckpointError("another model"))
    with pytest.raises(RunEnded) as caught:
        gang.after_controller_state_update(state("RunningState"), failed(rank_1=mistake))
    received = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(received.diagnosis.error, CheckpointError)
    assert str(received.diagnosis.error) == "another model"
    assert all(event["event"] != "failure" for event in events(tmp_path))


def test_the_same_exception_twice_ends_it_too(gang: Any) -> None:
    from orchestration.launch.gang.callback import RunEnded

    bug = RankFailed("pid 11 on a", "ValueError", "ValueError: 1 is not 2 (step.py:7)", None)
    gang.after_controller_state_update(state("RunningState"), failed(rank_1=bug))
    with pytest.raises(RunEnded, match=r"rank 1 \(pid 11 on a\) raised ValueError: 1 is not 2"):
        gang.after_controller_state_update(state("RunningState"), failed(rank_1=bug))


def test_what_ranks_found_out_about_a_hang_is_the_reason(gang: Any, tmp_path: Path) -> None:
    from ray.exceptions import ActorDiedError

    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "hang.txt").write_text("the run hangs: silent: rank 3\n")
    gang.after_controller_state_update(
        state("RunningState"), failed(rank_0=ActorDiedError(), rank_1=ActorDiedError(), rank_2=ActorDiedError())
    )
    assert "the run hangs: silent: rank 3" in events(tmp_path)[-1]["reason"]


def test_a_node_that_is_taken_back_has_ranks_save(gang: Any, tmp_path: Path) -> None:
    leaving = state("PreemptingState", preemption_info=SimpleNamespace(preempted_ranks=[2, 3]))
    gang.after_controller_state_update(state("RunningState"), leaving)
    assert is_for_a_node(tmp_path)
    assert "ranks 2, 3" in (tmp_path / STOP_FILE).read_text()
    restarting = state("RestartingState", training_failed_error=RuntimeError("interrupted by node preemption"))
    gang.after_controller_state_update(leaving, restarting)
    assert not (tmp_path / STOP_FILE).exists(), "the next attempt must not stop"
    assert events(tmp_path)[-1]["reason"] == "interrupted by node preemption"


def test_a_users_stop_is_not_overwritten(gang: Any, tmp_path: Path) -> None:
    request_stop(tmp_path, "stop")
    leaving = state("PreemptingState", preemption_info=SimpleNamespace(preempted_ranks=[2]))
    gang.after_controller_state_update(state("RunningState"), leaving)
    assert not is_for_a_node(tmp_path)
