"""The driver of a launched run: start Ray Train, follow the gang, tell the user, keep the record.

Ray Train works in a thread; the main thread follows what ranks print and what happens to the gang, hands a signal or a
request to stop on to the ranks, and writes `launch.json`. Killed at any moment, it takes the gang with it, and the
same command goes on from the newest whole checkpoint.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import ClusterError, DeepStackError, PreemptedError, RankError
from megatron_deepstack.planning.check import check_plan, check_world, model_ranks
from megatron_deepstack.platform.device import gpu_memories
from orchestration.cluster import import_ray, ray_session
from orchestration.launch.before.checks import Finding
from orchestration.launch.before.placement import Demand, Node, Seat, check_groups_fit, demand_of, place
from orchestration.launch.before.preflight import check_cluster, check_here, require_sound
from orchestration.launch.before.report import whole_plan
from orchestration.launch.before.waiting import wait_for_seats
from orchestration.launch.driver.follow import Follower
from orchestration.launch.driver.record import (
    STOP_FILE,
    Events,
    LaunchRecord,
    State,
    newest_step,
    only_driver,
    write_record,
)
from orchestration.launch.driver.stopping import forget_request, is_for_a_node, stop_signals, wants_it_now
from orchestration.launch.gang.policy import diagnose
from orchestration.launch.gang.rank import Job

HEALTH_SECONDS: Final = 600.0
"""Silence of a worker process after which Ray calls it dead, beyond the recipe's own limit for a hang."""
_FOLLOW_SECONDS: Final = 0.5
_LEFT_NODE: Final = "a node was taken back, and the ranks saved before that"
START_RETRY_SECONDS: Final = 30.0
"""Longest wait for slots that were free a moment ago, before others are looked for."""
_FORWARDED: Final = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "NVTE_", "OMP_", "HF_", "WANDB_", "AWS_", "FSSPEC_")
"""Variables of the driver that ranks on other nodes get too, by their first letters."""
_NOT_FORWARDED: Final = ("CUDA_VISIBLE_DEVICES",)
_RANK_ENVIRONMENT: Final = {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def launch(
    recipe: Recipe, *, num_ranks: int | None = None, address: str | None = None, stop_after: int | None = None
) -> None:
    """Train `recipe` as a gang of Ray Train workers, and return when the run is done.

    `address`: an existing cluster, whose nodes see the store and `run_dir` under the same paths; otherwise Ray runs on
    this machine alone. Raises PreemptedError after a stop on request, RankError when the budget of restarts is used
    up, ClusterError for what the cluster lacks, and any expected failure that a rank raised.
    """
    run_dir = Path(recipe.run_dir).absolute()
    address = address or os.environ.get("RAY_ADDRESS")
    check_plan(recipe)
    with only_driver(run_dir):
        forget_request(run_dir)
        Events(run_dir).clear()
        record = LaunchRecord(cluster=address or "", max_failures=recipe.launch.max_failures)
        write_record(run_dir, record)
        try:
            with _cluster(recipe, num_ranks, address):
                _run(recipe, run_dir, record, num_ranks, stop_after)
            record.state, record.outcome, record.exit_code = State.FINISHED, "finished", 0
        except PreemptedError as error:
            record.state, record.outcome, record.exit_code = State.STOPPED, str(error), error.exit_code
            raise
        except DeepStackError as error:
            record.state, record.outcome, record.exit_code = State.FAILED, str(error), error.exit_code
            raise
        except (KeyboardInterrupt, SystemExit) as error:  # before there were ranks to hand it on to
            record.state, record.outcome, record.exit_code = State.STOPPED, "interrupted", PreemptedError.exit_code
            raise PreemptedError("interrupted before training began; run the same command again") from error
        except BaseException as error:
            record.state, record.outcome, record.exit_code = State.FAILED, f"{type(error).__name__}: {error}", 1
            raise
        finally:
            _write_end(run_dir, record)


def _write_end(run_dir: Path, record: LaunchRecord) -> None:
    """Write how the run ended. Where that fails (full disk) the user is told, and the run keeps its own end."""
    try:
        write_record(run_dir, record)
    except OSError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"launch: {RunFolder(run_dir).launch_record} could not be written: {error.strerror or error}. The run is "
            f"{record.state} ({record.outcome}), but `status` will call it lost; make room or fix the folder",
            markup=False,
        )


def _cluster(recipe: Recipe, num_ranks: int | None, address: str | None) -> Any:
    """The cluster to run on. A Ray of our own has a slot for each rank, however few CPUs this machine has."""
    return ray_session(_own_cpus(recipe, num_ranks), address, {}, gpus=None)


def _own_cpus(recipe: Recipe, num_ranks: int | None) -> int:
    wanted = (num_ranks or recipe.launch.ranks or model_ranks(recipe.parallel)) * recipe.launch.cpus_per_rank
    return max(wanted, len(os.sched_getaffinity(0)))


def dry_run(
    recipe: Recipe, show: Callable[[Any], None], *, num_ranks: int | None = None, address: str | None = None
) -> None:
    """Show all that `launch` would do, the checks included, as something for rich to print; nothing is trained.

    Without a cluster not even Ray is started. Raises ClusterError if a check failed.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    check_plan(recipe)
    if address is None:
        demand, seats = _seats_here(recipe, num_ranks)
        findings = check_here(recipe, demand, seats, os.getcwd())
        where = "one of its own, on this machine alone"
        show(_described(recipe, demand, seats, findings, where))
        require_sound(findings)
        return
    with _cluster(recipe, num_ranks, address):
        demand, seats = _seats_there(recipe, num_ranks)
        findings = check_cluster(import_ray(address), recipe, demand, seats, os.getcwd(), rank_environment(os.environ))
    show(_described(recipe, demand, seats, findings, address))
    require_sound(findings)


def _described(recipe: Recipe, demand: Demand, seats: Sequence[Seat], findings: Sequence[Finding], where: str) -> Any:
    step = newest_step(Path(recipe.run_dir))
    start = "from the beginning" if step is None else f"after step {step}, the newest checkpoint, if it is whole"
    return whole_plan(recipe, demand, seats, findings, rank_environment(os.environ), cluster=where, resumes_from=start)


def _seats_here(recipe: Recipe, num_ranks: int | None) -> tuple[Demand, tuple[Seat, ...]]:
    """Where ranks go on a cluster of this machine alone, which has a slot for each where there is no GPU."""
    gpus = len(gpu_memories())
    nodes = (Node("here", "127.0.0.1", socket.gethostname(), gpus, _own_cpus(recipe, num_ranks)),)
    demand = demand_of(recipe, nodes, num_ranks)
    check_world(recipe, demand.num_ranks)
    check_groups_fit(demand, nodes)
    return demand, place(demand, nodes)


def _seats_there(recipe: Recipe, num_ranks: int | None) -> tuple[Demand, tuple[Seat, ...]]:
    """Where ranks go on the running cluster, with nothing else on it."""
    from orchestration.launch.gang.callback import nodes_now

    nodes = nodes_now(free=False)
    demand = demand_of(recipe, nodes, num_ranks)
    check_world(recipe, demand.num_ranks)
    check_groups_fit(demand, nodes)
    return demand, place(demand, nodes)


def _run(recipe: Recipe, run_dir: Path, record: LaunchRecord, num_ranks: int | None, stop_after: int | None) -> None:
    follower = Follower(run_dir, record)

    def look_for_seats() -> tuple[Demand, tuple[Seat, ...]]:
        follower.look()
        return _seats_there(recipe, num_ranks)

    with stop_signals(run_dir, record) as second:
        demand, seats = wait_for_seats(
            look_for_seats,
            since=time.monotonic(),
            seconds=recipe.launch.start_seconds,
            tell=lambda what: follower.say(f"launch: waiting: {what}"),
            asked_to_stop=(run_dir / STOP_FILE).exists,
        )
        record.num_ranks = demand.num_ranks
        environment = rank_environment(os.environ)
        follower.say(f"launch: {_check(recipe, record, demand, seats, environment)} checks passed")
        os.environ.update(ray_train_settings(recipe))
        from orchestration.launch.gang.trainer import gang_trainer

        job = Job(recipe, os.getcwd(), stop_after)
        while True:
            fit = _Fit(gang_trainer(job, run_dir, demand, environment, START_RETRY_SECONDS))
            _follow(fit, follower, run_dir, second)
            if fit.stopped_with is None or not is_for_a_node(run_dir):
                break
            forget_request(run_dir)
            follower.note_restart(time.time(), _LEFT_NODE, ())
            follower.say(f"launch: {_LEFT_NODE}; going on on other nodes")
    if fit.error is not None:
        raise _told(fit.error, record) from fit.error
    if fit.stopped_with is not None:
        raise PreemptedError(fit.stopped_with)


def _follow(fit: _Fit, follower: Follower, run_dir: Path, second: threading.Event) -> None:
    """See Ray Train through to its end; raises PreemptedError if the run is to end at once."""
    fit.start()
    while fit.is_alive():
        fit.join(_FOLLOW_SECONDS)
        follower.look()
        if second.is_set() or wants_it_now(run_dir):
            raise PreemptedError("ended at once on request; the same command goes on from the newest checkpoint")
    follower.look()


def _check(
    recipe: Recipe, record: LaunchRecord, demand: Demand, seats: Sequence[Seat], environment: Mapping[str, str]
) -> int:
    """Number of checks, which all passed; raises ClusterError otherwise."""
    if record.cluster:
        findings = check_cluster(import_ray(record.cluster), recipe, demand, seats, os.getcwd(), environment)
    else:
        findings = check_here(recipe, demand, seats, os.getcwd())
    require_sound(findings)
    return len(findings)


class _Fit(threading.Thread):
    """Ray Train at work."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="ray train", daemon=True)
        self._trainer = trainer
        self.error: Exception | None = None
        self.stopped_with: str | None = None
        """What rank 0 said of a stop on request."""

    def run(self) -> None:
        try:
            self.stopped_with = self._trainer.fit().return_value
        except Exception as error:
            self.error = error


def ray_train_settings(recipe: Recipe) -> dict[str, str]:
    """Variables that Ray Train reads in the driver and hands to its controller."""
    return {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(HEALTH_SECONDS + recipe.health.hang_seconds),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_RETRY_SECONDS),
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # ranks print into files of the run
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # ranks work where the driver does
    }


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of every rank: what torchrun's users set for NCCL, torch, storage and the like, and our defaults."""
    forwarded = {
        name: value
        for name, value in environment.items()
        if (name.startswith(_FORWARDED) and name not in _NOT_FORWARDED) or name == "PYTHONWARNINGS"
    }
    return _RANK_ENVIRONMENT | forwarded


def _told(error: Exception, record: LaunchRecord) -> DeepStackError:
    """What ended the run, in our words."""
    from ray.train import ControllerError, WorkerGroupError

    from orchestration.launch.gang.callback import RunEnded, failures_of

    if isinstance(error, WorkerGroupError):
        places = [f"pid {one.pid} on {one.host}" for one in record.ranks]
        diagnosis = diagnose(failures_of(error.worker_failures, places))
        return RankError(
            f"{diagnosis.text}. All {record.max_failures} restarts (launch.max_failures) are used up; the same command "
            "goes on from the newest checkpoint"
        )
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    if isinstance(cause, RunEnded):
        return cause.diagnosis.error
    if isinstance(cause, DeepStackError):
        return cause
    return ClusterError(f"Ray Train's controller failed: {type(cause).__name__}: {cause}")
