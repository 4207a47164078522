"""A pool of real gloo ranks on this machine, started once and reused: importing torch and Megatron costs seconds.

`RankPool(n).run(function, *args)` calls `function(rank, *args)` in every rank and returns the results in rank order.
A rank that raises, dies or stays silent past the deadline ends the pool with a RankError that carries the traceback, or
the stacks of the silent ranks. Functions and arguments are pickled, so functions are module-level.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.errors import RankError

_GRACE_SECONDS = 5.0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


class RankPool:
    """Worker processes that are joined in one process group. A context manager; also closed when collected.

    A warning that is an error in the process that starts them is an error in them.
    """

    def __init__(self, num_ranks: int, deadline_seconds: float = 240.0) -> None:
        """Start the processes.

        Args:
            num_ranks: Their number.
            deadline_seconds: The longest that a `run` may take; the first one includes the start of the processes.
        """
        self.num_ranks, self.deadline_seconds = num_ranks, deadline_seconds
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        context = _context()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        saved = {key: os.environ.get(key) for key in _ENVIRONMENT}
        os.environ.update(_ENVIRONMENT)
        try:
            for rank in range(num_ranks):
                ours, theirs = context.Pipe()
                start = _Start(os.getpid(), rank, num_ranks, self._folder.name, dict(os.environ), warning_filters())
                process = context.Process(target=_serve, args=(start, theirs))
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
        finally:
            _restore(saved)

    @property
    def alive(self) -> bool:
        """Whether the pool can still run something."""
        return bool(self._processes)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function in every rank. The first failure ends the pool.

        Args:
            function: A function of a module, since it is pickled. It gets the number of its rank, then `args`.
            *args: Pickled as well.

        Returns:
            The results in rank order.

        Raises:
            RankError: A rank raised, died, or stayed silent beyond the deadline.
        """
        if not self.alive:
            raise RankError("this pool of ranks has ended after a failure; start another")
        for rank, pipe in enumerate(self._pipes):
            try:
                _send(pipe, (function, args))
            except ConnectionError:
                self._fail_by_death(rank)
        results: dict[int, Any] = {}
        deadline = time.monotonic() + self.deadline_seconds
        while len(results) < self.num_ranks:
            ready = wait(
                [p for r, p in enumerate(self._pipes) if r not in results], timeout=deadline - time.monotonic()
            )
            if not ready:
                self._fail(self._hang_message(set(range(self.num_ranks)) - set(results)))
            for rank in [r for r, pipe in enumerate(self._pipes) if pipe in ready]:
                results[rank] = self._receive(rank)
        return [results[rank] for rank in range(self.num_ranks)]

    def close(self) -> None:
        """End the processes; a second call does nothing."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=_GRACE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []
        self._folder.cleanup()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self, rank: int) -> Any:
        try:
            error, result = _receive(self._pipes[rank])
        except (EOFError, ConnectionResetError):
            self._fail_by_death(rank)
        if error is not None:
            self._fail(f"rank {rank} of {self.num_ranks} raised:\n{error}", cause=result)
        return result

    def _fail_by_death(self, rank: int) -> None:
        process = self._processes[rank]
        process.join(timeout=_GRACE_SECONDS)
        self._fail(f"rank {rank} of {self.num_ranks} died with exit code {process.exitcode}")

    def _fail(self, message: str, cause: BaseException | None = None) -> None:
        for process in self._processes:
            process.kill()
        self.close()
        raise RankError(message) from cause

    def _hang_message(self, silent: set[int]) -> str:
        for rank in silent:
            os.kill(self._processes[rank].pid or 0, signal.SIGUSR1)
        time.sleep(1.0)
        stacks = [f"rank {r}:\n{_stack_file(self._folder.name, r).read_text()}" for r in sorted(silent)]
        return "\n".join(
            [
                f"ranks {sorted(silent)} of {self.num_ranks} silent for {self.deadline_seconds:.0f} s; their stacks:",
                *stacks,
            ]
        )


def _restore(saved: dict[str, str | None]) -> None:
    for key, value in saved.items():
        if value is None:
            del os.environ[key]
        else:
            os.environ[key] = value


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"stacks-{rank}"


def _send(pipe: Connection, value: Any) -> None:
    """By value: torch's pickler for pipes would keep a file open for every tensor that lives, thousands in a suite."""
    pipe.send_bytes(pickle.dumps(value))


def _receive(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())


WarningFilter = tuple[Any, str, type[Warning], str, int]
"""Action, pattern of the message, class, pattern of the module, and line, as `warnings.filterwarnings` takes them."""


def warning_filters() -> list[WarningFilter]:
    """The filters of warnings in force in this process, the first one that fits being the one that counts.

    Filters of classes that other packages define are left out, since a rank would import these packages for them.
    """
    rules: Sequence[Any] = warnings.filters
    return [
        (action, _pattern(message), category, _pattern(module), line)
        for action, message, category, module, line in rules
        if category.__module__ == "builtins"
    ]


def _pattern(rule: Any) -> str:
    """Python keeps a pattern, a text that must be equal, or None for anything."""
    if rule is None:
        return ""
    return rf"{re.escape(rule)}\Z" if isinstance(rule, str) else str(rule.pattern)


def follow_filters(filters: Sequence[WarningFilter]) -> None:
    """Treat warnings in this process as another process does.

    Args:
        filters: What `warning_filters` gave there.
    """
    warnings.resetwarnings()
    for action, message, category, module, line in reversed(filters):
        warnings.filterwarnings(action, message, category, module, line)


_PRELOADED = "megatron_deepstack.testing.preloaded"


def _context() -> Any:
    """How ranks are started.

    Without a GPU they are forked from one process that has imported everything, since importing costs each of them 4 s
    of a core and 350 MB. CUDA does not survive a fork, so with a GPU each rank imports for itself.
    """
    from megatron_deepstack.platform.compute.device import has_gpu

    if has_gpu() or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED])
    return context


class _Start(NamedTuple):
    """What a rank is told at its start. A forked one has the environment of the process that it was forked from."""

    parent: int
    rank: int
    num_ranks: int
    folder: str
    environment: dict[str, str]
    filters: list[WarningFilter]


def _serve(start: _Start, pipe: Connection) -> None:
    """A rank's life: join, then answer calls until the pipe closes. Warnings are treated as in the parent process."""
    forked = _PRELOADED in sys.modules
    os.environ.clear()
    os.environ.update(start.environment, LOCAL_RANK=str(start.rank))
    follow_filters(start.filters)
    stacks = _stack_file(start.folder, start.rank).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from megatron_deepstack.platform.compute.megatron_cpu import adapt_megatron
    from megatron_deepstack.platform.processes.parent import die_with_parent
    from megatron_deepstack.platform.processes.process_group import join_by_file, leave

    die_with_parent(os.getppid() if forked else start.parent)
    adapt_megatron()
    from megatron_deepstack.testing.writers import lend_writers

    lend_writers()
    _worlds.update(folder=start.folder, rank=start.rank, num_ranks=start.num_ranks, number=0)
    join_by_file(Path(start.folder) / "rendezvous-0", start.rank, start.num_ranks)
    while True:
        try:
            function, args = _receive(pipe)
        except (EOFError, OSError):
            break
        try:
            _send(pipe, (None, function(start.rank, *args)))
        except Exception as error:
            _send(pipe, (traceback.format_exc(), _picklable(error)))
            return
    leave()


_worlds: dict[str, Any] = {}
"""Of a worker process: where its ranks meet, how often they have, and the groups in force."""


def be_the_only_rank(folder: Path) -> None:
    """Make this process a world of one rank, so that `groups_for` works in it as in a pool's worker.

    Call before anything of Megatron-Core is built. Does nothing in a pool's worker, which has its world.

    Args:
        folder: A folder in which no other world has met; files of the meeting are left in it.
    """
    from megatron_deepstack.platform.compute.megatron_cpu import adapt_megatron

    if not _worlds:
        adapt_megatron()
        _worlds.update(folder=str(folder), rank=0, num_ranks=1, number=0)


def groups_for(parallel: ParallelConfig, seed: int = 0) -> Any:
    """The process groups of a layout, inside a pool's worker. Collective over all ranks of the pool.

    They are those of the last call if the layout is the same. Otherwise the world is left and joined again: gloo groups
    that are merely forgotten keep their threads, and a suite of a hundred layouts would end with thousands of them.

    Args:
        parallel: The layout.
        seed: Seed of the random numbers that each rank draws.

    Returns:
        `parallel.groups.Groups`.
    """
    from megatron_deepstack.parallel.groups import create_groups
    from megatron_deepstack.platform.processes.garbage import settle
    from megatron_deepstack.platform.processes.process_group import join_by_file, leave

    layout = (parallel.tensor, parallel.context, parallel.pipeline, parallel.virtual_pipeline, parallel.expert)
    if _worlds.get("layout") != layout:
        _worlds.update(layout=None, groups=None)
        leave()
        _end_threads_of_groups()
        _worlds["number"] += 1
        rendezvous = Path(_worlds["folder"]) / f"rendezvous-{_worlds['number']}"
        join_by_file(rendezvous, _worlds["rank"], _worlds["num_ranks"])
        _worlds.update(layout=layout, groups=create_groups(parallel, seed))
        if _worlds["number"] == 1:
            settle()
    return _worlds["groups"]


def _end_threads_of_groups() -> None:
    """A gloo group ends its three threads, one of which wakes up 100 times a second, with the last reference to it.

    Models are garbage in cycles, and Megatron-Core's rotary embeddings are kept by the caches of their own methods.
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    for kind in (RotaryEmbedding, YarnRotaryEmbedding):
        kind.forward.cache_clear()
    gc.collect()


def _picklable(error: Exception) -> Exception:
    """The error itself where it survives the pipe, for callers that tell users' mistakes from crashes."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(str(error))
    return error
