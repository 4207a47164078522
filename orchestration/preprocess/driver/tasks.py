"""Parts as Ray tasks, a window of them in flight. The only file of the job that hands work to Ray.

Ray does no retries of its own: what is done again, and how often, is decided and counted here. A part whose worker
died, or that was lost with its node, is done elsewhere, up to a number of times. (Images do not kill workers: they are
decoded in processes of their own.)
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from megatron_deepstack.data.images.decoder import DECODER_ENVIRONMENT
from megatron_deepstack.errors import ClusterError, DataError
from orchestration.cluster import import_ray, ray_session
from orchestration.preprocess.driver.nodes import check_nodes
from orchestration.preprocess.driver.progress import JobProgress
from orchestration.preprocess.driver.signals import stop_on_signals
from orchestration.preprocess.part.parts import ImagePart, Part
from orchestration.preprocess.part.work import Job, PartDone, do_part

WORKER_ENVIRONMENT: Final = DECODER_ENVIRONMENT
"""Handed on to the decoder process of each worker."""
_PARTS_PER_WORKER: Final = 100
"""Parts after which a worker process is replaced, so that leaks of decoders stay bounded."""
_MOST_CRASHES: Final = 3
"""Workers that may die over a part before the job stops."""
_MOST_LOSSES: Final = 10
"""Nodes that may be lost under a part."""
_TICK_SECONDS: Final = 1.0
"""Longest wait for a task before progress is shown and the lease looked at."""
_RECOUNT_SECONDS: Final = 5.0
"""Between two looks at how many CPUs the cluster has."""
_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Finished:
    """A part that was done, and where."""

    done: PartDone
    node: str
    """Host name or address."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A part that is to be done, and what has gone wrong with it so far."""

    part: Part
    crashes: int = 0
    """Workers that died over it."""
    losses: int = 0
    """Nodes that were lost under it."""


def do_here(job: Job, parts: Sequence[Part], tick: Callable[[], None]) -> Generator[Finished, None, None]:
    """Do parts one after the other, in this process.

    Args:
        job: The job.
        parts: The parts to do.
        tick: Called before each part; what it raises ends the job.

    Yields:
        Each part when it is finished.
    """
    for part in parts:
        tick()
        yield Finished(do_part(job, part), os.uname().nodename)


def do_with_ray(
    job: Job,
    parts: Sequence[Part],
    workers: int | None,
    address: str | None,
    progress: JobProgress,
    tick: Callable[[], None],
) -> Generator[Finished, None, None]:
    """Do parts in worker processes of a Ray cluster.

    Args:
        job: The job.
        parts: The parts to do.
        workers: See `preprocess`.
        address: An existing Ray cluster; None for one of this machine alone.
        progress: Where the job stands; its clock starts again when Ray is up.
        tick: Called at least every second; what it raises ends the job.

    Yields:
        Parts in the order in which they are finished.
    """
    if not parts:
        return
    outlives_job = import_ray(address).is_initialized()
    with ray_session(workers, address, WORKER_ENVIRONMENT) as ours, stop_on_signals():  # Ray puts handlers of its own
        ray = import_ray(address)
        progress.say(f"preprocess: Ray is up after {progress.seconds:.1f} s")
        if not ours:
            check_nodes(ray, job, parts, WORKER_ENVIRONMENT)
        window = _Window(ray, job, workers, progress, {} if ours else WORKER_ENVIRONMENT, outlives_job)
        progress.workers = window.num_workers()
        progress.restart_clock()
        yield from window.run(parts, tick)


class _Window:
    """Tasks under way: two for each worker, so that none waits for the driver."""

    def __init__(
        self,
        ray: Any,
        job: Job,
        workers: int | None,
        progress: JobProgress,
        environment: dict[str, str],
        outlives_job: bool,
    ) -> None:
        self._ray = ray
        self._outlives_job = outlives_job
        """Ray was up before the job and stays up after it, and would finish tasks that nobody waits for."""
        self._progress = progress
        self._workers = workers
        self._counted = (0.0, 1)
        self._job = ray.put(job)
        options: dict[str, Any] = {"num_cpus": 1, "max_retries": 0, "max_calls": _PARTS_PER_WORKER}
        self._task = ray.remote(**options)(_on_node)
        if environment:
            self._task = self._task.options(runtime_env={"env_vars": environment})
        self._running: dict[Any, Assignment] = {}

    def run(self, parts: Sequence[Part], tick: Callable[[], None]) -> Iterator[Finished]:
        """Parts as they are finished, until all are."""
        waiting = deque(Assignment(part) for part in parts)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < 2 * self.num_workers():
                    self._start(waiting.popleft())
                finished, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_TICK_SECONDS)
                tick()
                for reference in finished:
                    result = self._result(reference, self._running.pop(reference))
                    if isinstance(result, Assignment):
                        waiting.appendleft(result)
                    else:
                        yield result
        finally:
            # Elsewhere tasks end with our connection. Not asked to end before: a reply that crosses a cancellation ends
            # the whole process in Ray 2.60 (a check in its task manager), with an exit code of its own.
            for reference in self._running if self._outlives_job else ():
                self._ray.cancel(reference)

    def _start(self, assignment: Assignment) -> None:
        self._running[self._task.remote(do_part, self._job, assignment.part)] = assignment

    def num_workers(self) -> int:
        """CPUs of the cluster, which may grow and shrink, unless the user gave a number."""
        counted_at, workers = self._counted
        if self._workers is not None:
            return self._workers
        if time.monotonic() - counted_at > _RECOUNT_SECONDS:
            workers = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
            self._counted = (time.monotonic(), workers)
        return workers

    def _result(self, reference: Any, assignment: Assignment) -> Finished | Assignment:
        """What a task returned, or how its part is to be done again. Errors of the task itself are raised."""
        errors = self._ray.exceptions
        try:
            node, done = self._ray.get(reference)
            return Finished(done, node)
        except errors.RayTaskError as error:
            raise error.cause from error
        except errors.NodeDiedError as error:
            again, what = after_loss(assignment, error), "its node was lost"
        except (errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
            again, what = after_crash(assignment, error), "its worker died"
        except errors.RayError as error:
            raise ClusterError(f"part {assignment.part.name}: Ray could not run it: {error}") from error
        self._progress.again(f"{assignment.part.name}: {what}; it is done again")
        return again


def after_loss(assignment: Assignment, error: Exception) -> Assignment:
    """The assignment once more, after its node was lost.

    Args:
        assignment: A part, and how often it has failed.
        error: What Ray raised.

    Returns:
        The assignment with one more loss.

    Raises:
        ClusterError: Nodes were lost during this part too often.
    """
    if assignment.losses >= _MOST_LOSSES:
        raise ClusterError(
            f"part {assignment.part.name}: {_MOST_LOSSES + 1} nodes were lost while they worked on it: {error}. "
            "What is done is kept: repair the cluster, then run the same command again."
        ) from error
    return replace(assignment, losses=assignment.losses + 1)


def after_crash(assignment: Assignment, error: Exception) -> Assignment:
    """The assignment once more, after its worker died.

    Args:
        assignment: A part, and how often it has failed.
        error: What Ray raised.

    Returns:
        The assignment with one more crash.

    Raises:
        DataError: Workers died during this part too often.
    """
    if assignment.crashes >= _MOST_CRASHES:
        part = assignment.part
        paths = ", ".join(part.paths[:_SHOWN]) + ", ..." if isinstance(part, ImagePart) else "records"
        raise DataError(
            f"part {part.name} ({paths}): its worker died {_MOST_CRASHES + 1} times: {error}. Everything else that was "
            "done is kept. Look at the memory of the machine; then run the same command again."
        ) from error
    return replace(assignment, crashes=assignment.crashes + 1)


def _on_node(work: Callable[[Job, Part], PartDone], job: Job, part: Part) -> tuple[str, PartDone]:
    """A task: one part, and the address of the node that did it."""
    node: str = import_ray(None).util.get_node_ip_address()
    return node, work(job, part)
