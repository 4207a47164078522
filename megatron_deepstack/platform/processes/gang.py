"""The ranks of one machine as a group that ends together: how each rank ended, and which one caused a failure.

A rank reports through its pipe how it ended: with a result, with an expected error, or with a traceback. A rank that
was killed reports nothing. When one rank fails the others fail too, since their collectives break. So the failure that
is seen first is not always the cause, and `cause` chooses the most likely one.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_deepstack.errors import DeepStackError, HangError, PreemptedError, RankError
from megatron_deepstack.platform.processes.cut_off import exception_in, is_cut_off

SETTLE_SECONDS = 2.0
"""Time after a broken collective in which the death or error of another rank still counts as the cause."""
STOPPED = "stopped on request"
"""Default message for ranks that end on request and report nothing."""
_EXIT_SECONDS = 60.0
"""Longest time that a rank may take to end after its result, or after it has saved on request."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank reports at its end: one of the three fields."""

    result: Any = None
    """What its function returned."""
    error: DeepStackError | None = None
    """An expected failure."""
    trace: str | None = None
    """Traceback of any other exception."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a rank ended."""

    rank: int
    pid: int
    report: Report | None
    """None if the rank reported nothing."""
    exit_code: int = 0
    """Exit code of a process that reported nothing; a negative one is the signal that killed it."""

    @property
    def failed(self) -> bool:
        """Whether the rank ended without a result."""
        return self.report is None or self.report.error is not None or self.report.trace is not None

    @property
    def order_among_causes(self) -> int:
        """Number in the order of possible causes; the lowest is the most likely one.

        0: killed; 1: expected error; 2: ended without a report; 3: other exception; 4: lost connection to another rank.
        """
        if self.report is None:
            return 0 if self.exit_code < 0 else 2
        if self.report.error is not None:
            return 1
        return 4 if is_cut_off(*exception_in(self.report.trace or "")) else 3

    def as_error(self) -> DeepStackError:
        """Return the error that the user sees."""
        who = f"rank {self.rank} (pid {self.pid})"
        if self.report is None:
            return _silent_end(who, self.exit_code)
        return self.report.error or RankError(f"{who} raised:\n{(self.report.trace or '').rstrip()}")


def cause(endings: Iterable[Ending]) -> Ending:
    """Choose the ending that most likely caused the failure.

    Args:
        endings: Endings in order of time; at least one of them failed.

    Returns:
        The ending with the lowest `order_among_causes`, the earliest of several.
    """
    return min((ending for ending in endings if ending.failed), key=lambda ending: ending.order_among_causes)


class Gang:
    """Ranks that were started. Each of them leads a process group, so that no process started by a rank outlives it."""

    def __init__(self, processes: Sequence[BaseProcess], pipes: Sequence[Connection], stopped: str = STOPPED) -> None:
        """Args:
        processes: The started processes, by rank.
        pipes: The pipe from which the `Report` of each rank is read, by rank.
        stopped: Message to the user if ranks end on request and report nothing.
        """
        self.processes, self.pipes, self._stopped = processes, pipes, stopped
        self._exits = [_exit_handle(process) for process in processes]
        self._endings: dict[int, Ending] = {}
        self._stopping = False

    def ask_to_stop(self) -> None:
        """Send every rank SIGTERM, so that it saves and ends. The second call kills all ranks."""
        number = signal.SIGKILL if self._stopping else signal.SIGTERM
        self._stopping = True
        for rank, process in enumerate(self.processes):
            if rank not in self._endings:
                with suppress(ProcessLookupError):
                    os.kill(process.pid or 0, number)

    def wait(self) -> Any:
        """Wait until all ranks have ended; when one fails, end the others.

        Returns:
            The result of rank 0.

        Raises:
            DeepStackError: The error of the rank that caused the failure.
        """
        try:
            while self._missing() and not self._failed():
                self._collect(None)
            if self._failed():
                self._settle()
                raise self._error() from None
            for process in self.processes:
                process.join(_EXIT_SECONDS)
            report = self._endings[0].report
            return None if report is None else report.result
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill every rank, also one that SIGSTOP has paused, with all processes that it has started."""
        for process in self.processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
            process.join()
        for handle, process in zip(self._exits, self.processes, strict=False):
            if handle != process.sentinel:
                with suppress(OSError):
                    os.close(handle)
        self._exits = []

    def _missing(self) -> list[int]:
        return [rank for rank in range(len(self.processes)) if rank not in self._endings]

    def _failed(self) -> bool:
        return any(ending.failed for ending in self._endings.values())

    def _settle(self) -> None:
        """Wait a short time for the cause to be reported; if ranks have saved on request, wait until all have ended."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while self._missing():
            first = cause(self._endings.values())
            if first.report is not None and isinstance(first.report.error, PreemptedError):
                deadline = max(deadline, time.monotonic() + _EXIT_SECONDS)
            elif first.order_among_causes < 2:
                return
            if not self._collect(deadline - time.monotonic()):
                return

    def _collect(self, timeout: float | None) -> bool:
        """Record what ranks report and how they end; return False if nothing happened in time."""
        missing = self._missing()
        by_source: dict[Any, int] = {self.pipes[rank]: rank for rank in missing}
        by_source.update({self._exits[rank]: rank for rank in missing})
        ready = wait(list(by_source), None if timeout is None else max(timeout, 0.0))
        for rank in sorted({by_source[source] for source in ready}):
            self._endings[rank] = self._ending(rank)
        return bool(ready)

    def _ending(self, rank: int) -> Ending:
        process, pipe = self.processes[rank], self.pipes[rank]
        report = None
        with suppress(EOFError, ConnectionResetError):
            if pipe.poll():
                report = pipe.recv()
        if report is None:
            process.join()
        return Ending(rank, process.pid or 0, report, 0 if report is not None else process.exitcode or 0)

    def _error(self) -> DeepStackError:
        first = cause(self._endings.values())
        if self._stopping and first.report is None and first.exit_code in (-signal.SIGTERM, -signal.SIGKILL):
            return PreemptedError(self._stopped)
        return first.as_error()


def _exit_handle(process: BaseProcess) -> int:
    """Return a file descriptor that becomes readable when the process ends.

    The sentinel of the process is used only if the kernel has no pidfd, since processes that the rank has forked keep
    the sentinel open.
    """
    try:
        return os.pidfd_open(process.pid or 0)
    except OSError:
        return process.sentinel


def _silent_end(who: str, exit_code: int) -> DeepStackError:
    if exit_code == HangError.exit_code:
        return HangError(f"{who} found the run hanging and ended it; silent ranks and stacks are named above")
    if exit_code >= 0:
        return RankError(f"{who} ended with exit code {exit_code} and without a word")
    name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else "an unknown one"
    hint = "; the kernel does that when memory runs out (see dmesg)" if exit_code == -signal.SIGKILL else ""
    return RankError(f"{who} was killed by signal {-exit_code} ({name}){hint}; the other ranks were ended")
