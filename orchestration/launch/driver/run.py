"""The driver of a launched run: start Ray Train, follow the gang, tell the user, keep the record.

The checks, then Ray Train, work in a thread; the main thread follows what ranks print and what happens to the gang,
passes a signal or a request to stop on to the ranks, and writes `launch.json`, by which other shells see that it is
alive. If it is killed, the gang ends with it, and the same command goes on from the newest whole checkpoint.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import ClusterError, DeepStackError, PreemptedError, RankError
from megatron_deepstack.planning.check import check_plan, check_world, model_ranks
from megatron_deepstack.platform.compute.device import gpu_memories
from megatron_deepstack.platform.files.run_disk import require_writable
from megatron_deepstack.platform.files.run_lock import run_lock
from megatron_deepstack.training.guard.watchdog import PATIENT
from orchestration.cluster import import_ray, ray_session
from orchestration.launch.before.checks import Check
from orchestration.launch.before.placement import Demand, Node, Seat, check_groups_fit, demand_of, place
from orchestration.launch.before.preflight import check_cluster, check_here, longest_check_seconds, require_sound
from orchestration.launch.before.report import whole_plan
from orchestration.launch.before.waiting import wait_for_seats
from orchestration.launch.driver.background import BackgroundCheck, follow
from orchestration.launch.driver.follow import Follower
from orchestration.launch.driver.record import (
    Events,
    LaunchRecord,
    RunState,
    newest_step,
    write_record,
)
from orchestration.launch.driver.stopping import forget_request, is_asked, is_for_a_node, stop_signals
from orchestration.launch.environment import RankEnvironment, rank_environment
from orchestration.launch.gang.policy import diagnose
from orchestration.launch.gang.rank import RankTask

HEALTH_SECONDS: Final = 600.0
"""Silence of a worker process after which Ray calls it dead, beyond the recipe's own limit for a hang."""
_LEFT_NODE: Final = "a node was taken back, and the ranks saved before that"
START_RETRY_SECONDS: Final = 30.0
"""Longest wait for slots that were free a moment ago, before others are looked for."""


def launch(
    recipe: Recipe, *, num_ranks: int | None = None, address: str | None = None, stop_after: int | None = None
) -> None:
    """Train a recipe as a gang of Ray Train workers, and return when the run is done.

    Args:
        recipe: The run's recipe.
        num_ranks: Number of workers; if None, as the recipe says.
        address: An existing cluster, whose nodes see the stores and `run_dir` under the same paths; otherwise Ray runs
            on this machine alone.
        stop_after: Step after which the run saves and ends; None for all steps of the recipe.

    Raises:
        PreemptedError: The run was stopped on request.
        RankError: Ranks failed more often than `launch.max_failures`.
        ClusterError: The cluster lacks something.
        RunFolderError: The run folder cannot be written, or another process trains in it.
        DeepStackError: Any other expected failure that a rank raised.
    """
    run_dir = Path(recipe.run_dir).absolute()
    address = address or os.environ.get("RAY_ADDRESS")
    check_plan(recipe)
    require_writable(run_dir)
    with run_lock(run_dir, "launch", _tell):
        forget_request(run_dir)
        Events(run_dir).clear()
        record = LaunchRecord(cluster=address or "", max_failures=recipe.launch.max_failures)
        write_record(run_dir, record)
        try:
            follower = Follower(run_dir, record)
            where, most = ("starting Ray on this machine", "about a minute")
            if address:
                where, most = f"joining the Ray cluster at {address}", "some minutes, where something else answers"
            follower.say(f"launch: {where}; 5 to 20 s as a rule, at most {most}")
            with _cluster(recipe, num_ranks, address):
                _run(recipe, run_dir, record, follower, num_ranks, stop_after)
            record.state, record.outcome, record.exit_code = RunState.FINISHED, "finished", 0
        except PreemptedError as error:
            record.state, record.outcome, record.exit_code = RunState.STOPPED, str(error), error.exit_code
            raise
        except DeepStackError as error:
            record.state, record.outcome, record.exit_code = RunState.FAILED, str(error), error.exit_code
            raise
        except (KeyboardInterrupt, SystemExit) as error:  # before there were ranks to hand it on to
            record.state, record.outcome, record.exit_code = RunState.STOPPED, "interrupted", PreemptedError.exit_code
            raise PreemptedError("interrupted before training began; run the same command again") from error
        except BaseException as error:
            record.state, record.outcome, record.exit_code = RunState.FAILED, f"{type(error).__name__}: {error}", 1
            raise
        finally:
            _write_end(run_dir, record)


def _tell(line: str) -> None:
    """A line before there is anything to follow."""
    Console(highlight=False, soft_wrap=True).print(f"launch: {line}", markup=False)


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
    """Show all that `launch` would do, the checks included; nothing is trained.

    Without a cluster not even Ray is started.

    Args:
        recipe: The run's recipe.
        show: Receives something for rich to print.
        num_ranks: Number of workers; if None, as the recipe says.
        address: An existing cluster; None for this machine alone.

    Raises:
        ClusterError: A check failed.
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


def _described(recipe: Recipe, demand: Demand, seats: Sequence[Seat], findings: Sequence[Check], where: str) -> Any:
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


def _run(
    recipe: Recipe,
    run_dir: Path,
    record: LaunchRecord,
    follower: Follower,
    num_ranks: int | None,
    stop_after: int | None,
) -> None:
    def look_for_seats() -> tuple[Demand, tuple[Seat, ...]]:
        follower.look()
        return _seats_there(recipe, num_ranks)

    with stop_signals(run_dir, record) as second:
        demand, seats = wait_for_seats(
            look_for_seats,
            since=time.monotonic(),
            seconds=recipe.launch.start_seconds,
            tell=lambda what: follower.say(f"launch: waiting: {what}"),
            asked_to_stop=partial(is_asked, run_dir),
        )
        record.num_ranks = demand.num_ranks
        environment = rank_environment(os.environ)
        follower.say(_what_is_checked(record, seats))
        checks = BackgroundCheck("checks", lambda: _check(recipe, record, demand, seats, environment))
        follow(checks, follower, run_dir, second)
        follower.say(f"launch: {checks.outcome()} checks passed")
        if is_asked(run_dir):
            raise PreemptedError("stopped on request before ranks were started; the same command starts them")
        follower.say(_what_is_waited_for(recipe, demand))
        os.environ.update(ray_train_settings(recipe))
        from orchestration.launch.gang.trainer import gang_trainer

        task = RankTask(recipe, os.getcwd(), stop_after, environment.private)
        while True:
            trainer = gang_trainer(task, run_dir, demand, environment.shown, START_RETRY_SECONDS)
            fit = BackgroundCheck("ray train", partial(_fit, trainer))
            follow(fit, follower, run_dir, second)
            if fit.result is None or not is_for_a_node(run_dir):
                break
            forget_request(run_dir)
            follower.note_restart(time.time(), _LEFT_NODE, ())
            follower.say(f"launch: {_LEFT_NODE}; going on on other nodes")
    if fit.error is not None:
        raise _told(fit.error, record) from fit.error
    if fit.result is not None:
        raise PreemptedError(fit.result)


def _fit(trainer: Any) -> Any:
    """What rank 0 said of a stop on request; None at the end of the run."""
    return trainer.fit().return_value


def _what_is_checked(record: LaunchRecord, seats: Sequence[Seat]) -> str:
    if not record.cluster:
        return "launch: checking this machine"
    nodes = len({seat.node.id for seat in seats})
    longest = longest_check_seconds(seats) / 60
    what = "checking 1 node" if nodes == 1 else f"checking {nodes} nodes and the links between them"
    return f"launch: {what}; a node's process needs 10 to 30 s to start, at most {longest:.0f} min in all"


def _what_is_waited_for(recipe: Recipe, demand: Demand) -> str:
    minutes = PATIENT * recipe.health.hang_seconds / 60
    limit = f"at most {minutes:.0f} min" if minutes else "without a limit (health.hang_seconds 0)"
    return (
        f"launch: starting {demand.num_ranks} ranks: workers within {recipe.launch.start_seconds:.0f} s "
        f"(launch.start_seconds), then weights, checkpoint and the first step, {limit}"
    )


def _check(
    recipe: Recipe, record: LaunchRecord, demand: Demand, seats: Sequence[Seat], environment: RankEnvironment
) -> int:
    """Number of checks, which all passed; raises ClusterError otherwise."""
    if record.cluster:
        findings = check_cluster(import_ray(record.cluster), recipe, demand, seats, os.getcwd(), environment)
    else:
        findings = check_here(recipe, demand, seats, os.getcwd())
    require_sound(findings)
    return len(findings)


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
