"""The watchdog: a thread per rank that ends a run whose steps have stopped, and says who is to blame.

A rank that has made no progress for `health.hang_seconds` calls the hang. All others hear of it within a beat, every
rank writes the stacks of its threads, and after a few more beats it is clear which ranks are silent (stopped, swapped
out, gone) and which wait for them. Then each rank ends itself, since its main thread waits in a collective that no
exception can interrupt. Launchers treat that like a dead rank and start again from the newest checkpoint.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.errors import HangError
from megatron_deepstack.training.guard.heartbeat import Heartbeats, silent_ranks
from megatron_deepstack.training.guard.node_board import Beat

PATIENT = 3.0
"""Factor on `hang_seconds` for loading, a first step (kernels are built, memory is laid out) and saving."""
_LONGEST_BEAT_SECONDS = 10.0
_FIRST_BEAT_SECONDS = 1.0
"""Until the second beat."""
_BEATS_TO_TELL = 3
"""The rank that tells must be the first to end: launchers end the others with it."""
_CALL = "hang.txt"
_BEATS_TO_WATCH = 8
"""Beats within which a live rank is heard of through its node's file; at the longest beat more than the minute that NFS
may keep old files and the beat that a node's file may be behind its ranks."""


class Watchdog:
    """Beats for its rank and watches over its progress. A context manager."""

    def __init__(self, run_dir: Path, rank: int, num_ranks: int, hang_seconds: float) -> None:
        """Prepare the run's folders. The thread is not started yet.

        Args:
            run_dir: The run folder.
            rank: This rank.
            num_ranks: Number of ranks of the run.
            hang_seconds: Seconds without progress after which the run hangs; 0: beat, but never report a hang.
        """
        self.run_dir, self.hang_seconds = run_dir, hang_seconds
        self.beat_seconds = min(hang_seconds / 20 or _LONGEST_BEAT_SECONDS, _LONGEST_BEAT_SECONDS)
        self.beats = Heartbeats(run_dir, rank, num_ranks)
        self.stacks = RunFolder(run_dir).stacks
        self.stacks.mkdir(parents=True, exist_ok=True)
        self._called = self.stacks / _CALL
        self._earlier_call = self._last_call()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.progress("loading", PATIENT)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        end = "it has ended" if error is None else f"{type(error).__name__} ended it"
        self.beats.write(f"nothing: {end}", last=True)
        self.beats.close()

    def progress(self, doing: str, patience: float = 1.0) -> None:
        """Note that the rank begins something new.

        Args:
            doing: What it is, for people.
            patience: How many times `hang_seconds` it may take.
        """
        self._state = (doing, time.monotonic(), patience)

    def _watch(self) -> None:
        self.beats.write(self._state[0])
        seconds = min(self.beat_seconds, _FIRST_BEAT_SECONDS)
        while not self._closed.wait(seconds):
            seconds = self.beat_seconds
            doing, since, patience = self._state
            self.beats.write(doing)
            waited = time.monotonic() - since
            if self.hang_seconds and (waited > self.hang_seconds * patience or self._is_called()):
                self._end(doing, waited)

    def _end(self, doing: str, waited: float) -> None:
        """Tell of the hang and end the process, whatever fails in telling."""
        try:
            self._tell(doing, waited)
        finally:
            os._exit(HangError.exit_code)

    def _tell(self, doing: str, waited: float) -> None:
        """Show this rank's stacks, find the silent ranks, and let the first of the others say what is known."""
        if not self._is_called():
            _write(self._called, f"rank {self.beats.rank} has waited {waited:.0f} s\n")
        self.beats.board.pass_on_call()
        self._dump_stacks(doing)
        before = self.beats.read()
        self._beat_while_ending(doing, _BEATS_TO_WATCH)
        after = self.beats.read()
        silent = silent_ranks(before, after, self.beats.num_ranks)
        if self.beats.rank == min(set(range(self.beats.num_ranks)) - set(silent) | {self.beats.rank}):
            message = hang_message(after, silent, self.beats.num_ranks, waited, self.hang_seconds, self.stacks)
            _write(self._called, message + "\n")
            sys.stderr.write(f"error: {message}\n")
            sys.stderr.flush()
        else:
            self._beat_while_ending(doing, _BEATS_TO_TELL)

    def _beat_while_ending(self, doing: str, num_beats: int) -> None:
        for _ in range(num_beats):
            self.beats.write(doing, hanging=True)
            time.sleep(self.beat_seconds)

    def _dump_stacks(self, doing: str) -> None:
        with os.fdopen(os.memfd_create("stacks"), "w+", encoding="utf-8") as memory:
            faulthandler.dump_traceback(memory, all_threads=True)
            memory.seek(0)
            text = memory.read()
        _write(self.stacks / f"rank_{self.beats.rank:05d}.txt", text)
        sys.stderr.write(f"stacks of rank {self.beats.rank}, in {doing}:\n{text}\n")
        sys.stderr.flush()

    def _is_called(self) -> bool:
        """Whether any rank has called a hang; one rank of each node looks for the file that all nodes share."""
        board = self.beats.board
        if not board.is_called and self.beats.is_writer and self._last_call() != self._earlier_call:
            board.pass_on_call()
            return True
        return board.is_called

    def _last_call(self) -> int:
        """When a hang was last called in this run folder, in nanoseconds; 0: never."""
        try:
            return self._called.stat().st_mtime_ns
        except OSError:
            return 0


def _write(file: Path, text: str) -> None:
    """As far as the disk allows: a full one must not keep a hung rank from saying the rest and ending."""
    with suppress(OSError):
        file.write_text(text, encoding="utf-8")


def last_hang(run_dir: Path) -> str:
    """What was written about the last hang of a run; empty if there was none."""
    file = RunFolder(run_dir).stacks / _CALL
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def hang_message(
    beats: dict[int, Beat], silent: tuple[int, ...], num_ranks: int, waited: float, limit: float, stacks: Path
) -> str:
    """Describe a hang for the user.

    Args:
        beats: Last beat by rank.
        silent: Ranks that no longer beat.
        num_ranks: Number of ranks of the run.
        waited: Seconds without progress.
        limit: The recipe's `health.hang_seconds`.
        stacks: Folder of the ranks' stacks.

    Returns:
        The message, in one line.
    """

    def places(ranks: list[int]) -> str:
        return ", ".join(beats[rank].place if rank in beats else f"rank {rank} (never heard of)" for rank in ranks)

    waiting = [rank for rank in range(num_ranks) if rank not in silent]
    blame = (
        f"silent: {places(list(silent))}; waiting: {places(waiting)}"
        if silent
        else f"every rank is alive, and none gets on: {places(waiting)}"
    )
    return (
        f"the run hangs: no progress for {waited:.0f} s (health.hang_seconds {limit:g}); {blame}. Stacks of all that "
        f"could still speak: {stacks}"
    )
