"""The gang as Ray Train's controller sees it: where ranks go, how failures are reported, and which are not retried.

One object travels to the controller and follows the run there. Ray Train brings restarts and their budget, health
checks and the order of ranks; this adds what it does not know: tensor-parallel groups stay on one node, a mistake is
not retried, the wait for missing nodes has an end, and all of it is written down for the driver and for `status`.
The hooks are Ray Train's own callbacks, of which only some are called public; see `orchestration.ray_private`.

Import it after `orchestration.cluster.import_ray`, which makes settings that Ray reads when it is imported.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from megatron_deepstack.training.guard.watchdog import last_hang
from megatron_deepstack.training.retry import Failure, is_worth_a_retry
from orchestration.launch.before.placement import Demand, Node, place
from orchestration.launch.before.waiting import wait_for_seats
from orchestration.launch.driver.record import Events
from orchestration.launch.driver.stopping import forget_request, is_asked, is_for_a_node, request_stop
from orchestration.launch.gang.policy import Diagnosis, End, RankEnd, diagnose, end_of_exception
from orchestration.launch.gang.rank import RankFailed, enter, open_meeting_point
from orchestration.ray_private import (
    ControllerCallback,
    WorkerGroupCallback,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
    available_resources_per_node,
    cluster_state,
)

_NODE_LABEL = "ray.io/node-id"
_SETTLE_SECONDS = 2.0
"""After a rank lost a connection, the time in which the death at its other end still counts as the cause."""


class RunEnded(Exception):
    """A failure that another attempt would meet again; it ends Ray Train's control loop."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        super().__init__(diagnosis.text)
        self.diagnosis = diagnosis

    def __reduce__(self) -> tuple[type[RunEnded], tuple[Diagnosis]]:
        return type(self), (self.diagnosis,)


class Rendezvous(Backend):
    """In place of Ray Train's own set-up of torch: the variables of torchrun, and a store on one interface only.

    The process group itself is joined by `training.main.train`, in the thread that trains.
    """

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Open the meeting point on the node of rank 0, and tell every worker where it is.

        Args:
            worker_group: The workers, as Ray Train has started them.
            backend_config: Not used.
        """
        workers = worker_group.get_workers()
        address = workers[0].metadata.node_ip
        port = worker_group.execute_single(0, open_meeting_point, address)
        ray.get(
            [
                worker.execute_async(
                    enter, _variables(worker.distributed_context), worker.metadata.node_ip, address, port
                )
                for worker in workers
            ]
        )


def _variables(context: Any) -> dict[str, int]:
    """A worker's ranks by the names that torchrun gives them."""
    return {
        "RANK": context.world_rank,
        "WORLD_SIZE": context.world_size,
        "LOCAL_RANK": context.local_rank,
        "LOCAL_WORLD_SIZE": context.local_world_size,
        "NODE_RANK": context.node_rank,
    }


class MeetingConfig(TorchConfig):
    """Torch's configuration with our rendezvous."""

    @property
    def backend_cls(self) -> type[Backend]:
        return Rendezvous


class GangCallback(ControllerCallback, WorkerGroupCallback):
    """Follows the run in the controller."""

    def __init__(self, demand: Demand, run_dir: Path, start_seconds: float) -> None:
        self._demand, self._run_dir, self._start_seconds = demand, run_dir, start_seconds
        self._events = Events(run_dir)
        self._waiting_since: float | None = None
        self._hang_before = ""
        self._workers: Sequence[Any] = ()
        self._previous: Failure | None = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Wait for the slots and pin each rank to its node; the context's list of labels is made for that."""
        self._hang_before = last_hang(self._run_dir)
        self._events.add("start")
        self._waiting_since = self._waiting_since or time.monotonic()
        seats = wait_for_seats(
            lambda: place(self._demand, nodes_now(free=True)),
            since=self._waiting_since,
            seconds=self._start_seconds,
            tell=lambda what: self._events.add("waiting", what=what),
            asked_to_stop=partial(is_asked, self._run_dir),
        )
        for seat, selector in zip(seats, worker_group_context.label_selector, strict=True):
            selector[_NODE_LABEL] = seat.node.id

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._waiting_since = None
        self._workers = worker_group.get_workers()
        metadata = [worker.metadata for worker in self._workers]
        ranks = [
            {"rank": rank, "host": one.hostname, "address": one.node_ip, "pid": one.pid}
            for rank, one in enumerate(metadata)
        ]
        self._events.add("ranks", ranks=ranks)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Record a failure that Ray Train is about to retry.

        Args:
            previous_state: The state that Ray Train's controller leaves.
            current_state: The state that it enters.

        Raises:
            RunEnded: Another attempt would fail as well.
        """
        name = type(current_state).__name__
        if name == "RunningState" and type(previous_state).__name__ != "RunningState":
            self._events.add("running")
        elif name == "RestartingState" and hasattr(current_state.training_failed_error, "worker_failures"):
            diagnosis = self._diagnose(current_state.training_failed_error.worker_failures)
            if not is_worth_a_retry(diagnosis.failure, self._previous):
                raise RunEnded(diagnosis)
            self._previous = diagnosis.failure
            self._note(diagnosis.text, [failure.rank for failure in diagnosis.causes])
        elif name == "PreemptingState" and type(previous_state).__name__ != name:
            self._leave_nodes(current_state.preemption_info)
        elif name in ("RestartingState", "ReschedulingState"):
            if is_for_a_node(self._run_dir):  # the node went before its ranks had saved
                forget_request(self._run_dir)
            self._note(str(current_state.training_failed_error).splitlines()[-1], [])

    def _leave_nodes(self, info: Any) -> None:
        """Nodes are taken back (spot instances, drained Kubernetes nodes): let all ranks save while there is time."""
        if not is_asked(self._run_dir):
            ranks = [str(rank) for rank in info.preempted_ranks]
            request_stop(self._run_dir, f"Ray takes back the nodes of ranks {', '.join(ranks)}", how="drain")

    def _note(self, reason: str, ranks: Sequence[int]) -> None:
        self._events.add("failure", reason=reason, ranks=list(ranks))

    def _diagnose(self, errors: dict[int, Exception]) -> Diagnosis:
        """What happened; if only consequences are known, after a short wait for the cause."""
        found = diagnose(self._failures(errors))
        deadline = time.monotonic() + _SETTLE_SECONDS
        while found.causes[0].end is End.CUT_OFF and time.monotonic() < deadline:
            silent = [rank for rank in range(len(self._workers)) if rank not in errors]
            errors = errors | {rank: error for rank in silent if (error := self._error_of(rank)) is not None}
            found = diagnose(self._failures(errors))
            time.sleep(0.1)
        return self._with_hang(found)

    def _with_hang(self, found: Diagnosis) -> Diagnosis:
        """Ranks that found the run hanging end themselves; what they wrote about it is the reason then."""
        said = last_hang(self._run_dir)
        if not said or said == self._hang_before or found.causes[0].end is not End.DIED:
            return found
        first = found.causes[0]
        others = sorted({failure.rank for failure in found.causes[1:]} | set(found.followers))
        return Diagnosis((replace(first, end=End.HUNG, text=said),), tuple(others))

    def _error_of(self, rank: int) -> Exception | None:
        worker = self._workers[rank]
        try:
            error = ray.get(worker.actor.poll_status.remote(), timeout=_SETTLE_SECONDS).error
            return getattr(error, "_base_exc", error)
        except RayActorError as error:
            return error
        except ray.exceptions.GetTimeoutError:
            return None

    def _failures(self, errors: dict[int, Exception]) -> list[RankEnd]:
        return failures_of(errors, [f"pid {w.metadata.pid} on {w.metadata.hostname}" for w in self._workers])


def failures_of(errors: dict[int, Exception], places: Sequence[str]) -> list[RankEnd]:
    """Ray's exceptions and ours as failures.

    Args:
        errors: The exception of each rank that failed.
        places: By rank, the node and the process, in words.

    Returns:
        One failure for each of `errors`, in their order.
    """
    return [_failure(rank, error, places[rank] if rank < len(places) else "") for rank, error in errors.items()]


def _failure(rank: int, error: Exception, where: str) -> RankEnd:
    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    if isinstance(error, RankFailed):
        end = End.REFUSED if error.error is not None else end_of_exception(error.kind, error.text)
        return RankEnd(rank, error.where, end, error.text, error.error)
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return RankEnd(rank, where, End.SILENT, "its process has not answered Ray's health checks")
    if isinstance(error, OutOfMemoryError):
        return RankEnd(rank, where, End.DIED, "Ray ended it because the node ran out of memory")
    if isinstance(error, RayActorError):
        return _death(rank, str(error), where)
    return RankEnd(rank, where, End.RAISED, f"{type(error).__name__}: {error}")


def _death(rank: int, said: str, where: str) -> RankEnd:
    """An actor's death in our words; Ray's own run over ten lines of possible causes."""
    if "node has died" in said or "node was terminated" in said:
        return RankEnd(rank, where, End.NODE_DIED, "Ray has lost the node")
    text = "its process was killed or crashed; the kernel kills when memory runs out (see dmesg there)"
    return RankEnd(rank, where, End.DIED, text)


def nodes_now(*, free: bool) -> tuple[Node, ...]:
    """The cluster's nodes that are there to stay, with all they have or only with what is free."""
    available = available_resources_per_node() if free else {}
    leaving = cluster_state.get_draining_nodes()
    nodes = []
    for node in ray.nodes():
        if not node["Alive"] or node["NodeID"] in leaving:
            continue
        resources = available.get(node["NodeID"], {}) if free else node["Resources"]
        gpus, cpus = (int(resources.get(name, 0)) for name in ("GPU", "CPU"))
        nodes.append(Node(node["NodeID"], node["NodeManagerAddress"], node["NodeManagerHostname"], gpus, cpus))
    return tuple(nodes)
