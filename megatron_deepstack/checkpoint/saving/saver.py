"""Saving as the loop sees it: begin, poll, finish.

A save is planned in the training thread (collective, without a disk), copied and written beside it, and committed by
rank 0 beside it once every rank's writer is done. No rank writes before rank 0 holds the folder's lock, so a second run
in one run folder is refused before it has touched anything. Ranks agree on all that in `poll` with one small reduction,
and only while a save is in flight.
"""

from __future__ import annotations

import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from torch.distributed.checkpoint.metadata import Metadata

from megatron_deepstack.checkpoint.content.random_state import sharded_random_states
from megatron_deepstack.checkpoint.content.state import sharded_state
from megatron_deepstack.checkpoint.folder import checkpoint_path, looks_whole, partial_path, step_folders
from megatron_deepstack.checkpoint.saving.background import Background, Work
from megatron_deepstack.checkpoint.saving.commit import Commit, layout_facts
from megatron_deepstack.checkpoint.saving.plan import Planner
from megatron_deepstack.checkpoint.saving.retention import FolderLock
from megatron_deepstack.config.choices import SaveMode
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import CheckpointError, of_all_ranks
from megatron_deepstack.model.build import RankModel
from megatron_deepstack.parallel.groups import Axes
from megatron_deepstack.parallel.reduce import of_every_rank, start_lowest_over_ranks

_WAIT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is whole on disk."""

    step: int
    """Steps done."""
    path: Path
    num_bytes: int
    """Its size; 0 on ranks other than 0."""
    stall_seconds: float
    """Time that training was blocked for it on this rank."""
    waited_seconds: float
    """Part of that spent waiting for the save before it."""
    seconds: float
    """Time from its beginning until it was whole."""
    faults: tuple[str, ...] = ()
    """On rank 0, a line on each older checkpoint that should have been deleted and could not."""


class _State(IntEnum):
    """The state of one rank's work; the lowest of all ranks decides."""

    FAILED = 0
    RUNNING = 1
    DONE = 2


class _Flight:
    """A save that is not whole yet."""

    def __init__(self, step: int, final: Path) -> None:
        self.step, self.final = step, final
        self.begun, self.stall_seconds, self.waited_seconds = time.perf_counter(), 0.0, 0.0
        self.metadata: Metadata | None = None
        self.lock: FolderLock | None = None
        self.locking: Work | None = None
        """Rank 0's taking of the lock."""
        self.locked = threading.Event()
        """All ranks know that rank 0 has it, or that the save is given up."""
        self.work: Work | None = None
        """What this rank writes; None if it only waits for rank 0 to commit."""
        self.committing = False
        self.agreement: Callable[[], int] | None = None
        """The lowest state of all ranks, being found."""

    @property
    def current(self) -> Work | None:
        """What this rank is at; None if it waits for rank 0."""
        return self.work if self.locked.is_set() else self.locking

    @property
    def state(self) -> _State:
        if self.current is None:
            return _State.DONE
        if not self.current.done.is_set():
            return _State.RUNNING
        return _State.DONE if self.current.error is None else _State.FAILED

    def take_lock(self) -> int:
        self.lock = FolderLock(partial_path(self.final))
        return 0

    def wait_for_lock(self) -> None:
        self.locked.wait()

    def release(self) -> None:
        """Give up the lock, and the writer's waiting for it."""
        self.locked.set()
        if self.lock is not None:
            self.lock.release()


class Saver:
    """Checkpoints of a run. `begin`, `poll` and `finish` are collective over all ranks."""

    def __init__(
        self,
        recipe: Recipe,
        model: RankModel,
        optimizer: ChainedOptimizer,
        facts: Mapping[str, Any],
        axes: Axes,
        samples: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare saving; nothing is written yet.

        Args:
            recipe: The run's recipe.
            model: This rank's part of the model.
            optimizer: The optimizer whose states are saved.
            facts: The run's identity, for each manifest.
            axes: Ranks on each axis.
            samples: What the run reads, for each manifest.
        """
        self.recipe, self.model, self.optimizer = recipe, model, optimizer
        self._commit = Commit(
            facts=facts,
            samples=samples or {},
            layout=layout_facts(axes, recipe.parallel),
            num_ranks=axes.world_size,
            recipe_text=recipe_to_yaml(recipe),
            keep=recipe.checkpoint.keep,
            keep_every=recipe.checkpoint.keep_every,
        )
        self._planner = Planner()
        self._background: Background | None = None
        self._flight: _Flight | None = None
        self._saved: list[Saved] = []
        self._stall_seconds = 0.0
        _hold_updates(optimizer, self)

    def begin(self, step: int) -> None:
        """Start the checkpoint after `step` steps, once one in flight is whole. Under `mode: sync` wait for it too.

        Raises CheckpointError on every rank if the one in flight could not be written.
        """
        with self._blocked():
            begun = time.perf_counter()
            self._drain()
            flight = self._flight = _Flight(step, checkpoint_path(self.recipe.run_dir, step))
            flight.begun, flight.waited_seconds = begun, time.perf_counter() - begun
            state = sharded_state(self.model, self.optimizer)
            plan = self._planner.plan({**state, "random": sharded_random_states()})
            flight.metadata = plan.metadata
            if self._background is None:
                self._background = Background()
            rank = dist.get_rank()
            if rank == 0:
                flight.locking = Work(flight.take_lock)
            flight.work = self._background.write(plan, partial_path(flight.final), rank, flight.wait_for_lock)
        if self.recipe.checkpoint.mode is SaveMode.SYNC:
            with self._blocked():
                self._drain()

    def poll(self) -> Saved | None:
        """Go on with a save in flight without waiting; called in every step. The checkpoint if one became whole.

        Raises CheckpointError on every rank if one could not write.
        """
        with self._blocked():
            self._advance()
        return self._saved.pop(0) if self._saved else None

    def finish(self) -> Saved | None:
        """Wait for a save in flight; the checkpoint that became whole, if there was one. Raises as `poll` does."""
        with self._blocked():
            self._drain()
        return self._saved.pop(0) if self._saved else None

    def take_stall_seconds(self) -> float:
        """Time that training was blocked for saving since the last call."""
        seconds, self._stall_seconds = self._stall_seconds, 0.0
        return seconds

    def wait_for_copies(self) -> None:
        """Return once what is being saved may change. Called before each update by the optimizer itself."""
        if self._background is not None and not self._background.staged.is_set():
            with self._blocked():
                self._background.staged.wait()

    def close(self) -> None:
        """End this rank's writer and free its memory; a save in flight is lost. No collective: for any ending."""
        if self._background is not None:
            self._background.close()
            self._background = None
        if self._flight is not None:
            self._flight.release()
            self._flight = None

    def _drain(self) -> None:
        """Waits in slices, so that no collective outlasts the group's timeout while another rank writes."""
        while self._flight is not None:
            if self._flight.current is not None:
                self._flight.current.done.wait(_WAIT_SECONDS)
            self._advance()

    def _advance(self) -> None:
        """Act on what ranks agreed on since the last call, and begin to agree on the present state.

        So no rank waits here for a slower one.
        """
        if self._flight is not None and self._flight.agreement is not None:
            self._act(self._flight, self._flight.agreement())
        if self._flight is not None:
            self._flight.agreement = start_lowest_over_ranks(self._flight.state)

    def _act(self, flight: _Flight, state: int) -> None:
        flight.agreement = None
        if state == _State.FAILED:
            self._fail(flight)
        elif state == _State.DONE and not flight.locked.is_set():
            flight.locked.set()
        elif state == _State.DONE and not flight.committing:
            flight.committing, flight.work = True, None
            if dist.get_rank() == 0:
                assert flight.metadata is not None
                flight.work = Work(partial(self._commit.run, flight.final, flight.step, flight.metadata))
        elif state == _State.DONE:
            self._land(flight)

    def _land(self, flight: _Flight) -> None:
        flight.release()
        self._flight = None
        self._saved.append(
            Saved(
                step=flight.step,
                path=flight.final,
                num_bytes=0 if flight.work is None else flight.work.num_bytes,
                stall_seconds=flight.stall_seconds,
                waited_seconds=flight.waited_seconds,
                seconds=time.perf_counter() - flight.begun,
                faults=tuple(self._commit.faults),
            )
        )
        self._commit.faults.clear()

    def _fail(self, flight: _Flight) -> None:
        """Every rank is here. Ends the writers that still write, removes the folder if it is this run's, raises."""
        mine = flight.current.error if flight.current is not None and flight.state is _State.FAILED else None
        self.close()
        errors = of_every_rank(mine or "")
        if flight.lock is not None:
            shutil.rmtree(partial_path(flight.final), ignore_errors=True)
        of_every_rank("")  # a launcher ends all ranks as soon as one says why it left, rank 0 in the middle of removing
        found = "\n  ".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)
        raise of_all_ranks(
            CheckpointError(
                f"{flight.final}: the checkpoint after step {flight.step} could not be written:\n  {found}\n"
                f"{self._what_is_left()} Make the disk usable again (space, quota, permissions; checkpoint.keep "
                "bounds what is used), then run the same command again"
            )
        )

    def _what_is_left(self) -> str:
        steps = [step for step, path in step_folders(self.recipe.run_dir) if looks_whole(path)]
        if not steps:
            return "The run has no other checkpoint."
        return f"The newest one left is that after step {steps[-1]}: a resumed run goes on from there."

    @contextmanager
    def _blocked(self) -> Iterator[None]:
        """Count the time in which training waits."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self._stall_seconds += seconds
            if self._flight is not None:
                self._flight.stall_seconds += seconds


def _hold_updates(optimizer: ChainedOptimizer, saver: Saver) -> None:
    """Have every update of parameters and states wait for copies that a save makes of them."""
    reference = weakref.ref(saver)

    def hold(*_: Any) -> None:
        alive = reference()
        if alive is not None:
            alive.wait_for_copies()

    for single in optimizer.chained_optimizers:
        if isinstance(single.optimizer, torch.optim.Optimizer):
            single.optimizer.register_step_pre_hook(hold)
