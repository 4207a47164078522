"""A soak: one run, killed again and again at random steps, ends with the undisturbed run's parameters, bit for bit."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fault_runs import TrainCommand, course_of, fault_recipe, last_step
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_deepstack.checkpoint.folder import newest_whole
from megatron_deepstack.config.schema import Recipe

KILLS = int(os.environ.get("DEEPSTACK_SOAK_KILLS", "0"))
"""`make faults` asks for 20."""
STEPS_PER_KILL, INTERVAL, SEED = 15, 4, 20240604


def kill_plan(num_kills: int, seed: int) -> list[tuple[int, int | None]]:
    """For each kill the step to wait for and the rank to hit; None: the launcher. Steps ascend."""
    rng = random.Random(seed)
    steps = sorted(rng.sample(range(2, num_kills * STEPS_PER_KILL), num_kills))
    return [(step, rng.choice([0, 1, 0, 1, None])) for step in steps]


def soak(recipe: Recipe, plan: list[tuple[int, int | None]]) -> tuple[int, int]:
    """Run to the end through all kills; how many fell, and how many steps were run twice."""
    fallen = lost = 0
    command = TrainCommand(recipe, "--restarts", str(len(plan)))
    try:
        for step, rank in plan:
            command.until_step(step)
            attempts = command.attempts
            reached = kill(command, rank)
            fallen += 1
            if rank is None:
                attempts, command = 0, TrainCommand(recipe, "--restarts", str(len(plan)))
            command.until(partial(_has_tried_more, command, attempts), "another attempt")
            lost += reached - command.resumed
        assert command.end() == 0, command.text
    finally:
        command.__exit__()
    return fallen, lost


def _has_tried_more(command: TrainCommand, attempts: int) -> bool:
    return command.attempts > attempts


def kill(command: TrainCommand, rank: int | None) -> int:
    """kill -9 of a rank or of the launcher; the step reached."""
    if rank is not None:
        return command.hit(rank, signal.SIGKILL)
    command.process.kill()
    assert command.process.wait() == -signal.SIGKILL
    return last_step(command.run_dir)


def tensors_of(recipe: Recipe, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint: parameters, optimizer states, random states."""
    newest, faults = newest_whole(recipe.run_dir)
    assert newest is not None
    assert (newest.manifest.step, faults) == (step, [])
    state: dict[str, object] = {}
    _load_state_dict(
        state, storage_reader=dcp.FileSystemReader(newest.path), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    return dict(flattened(state))


def flattened(state: dict[str, object], path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{path}{key}/")
        elif isinstance(value, torch.Tensor):
            yield f"{path}{key}", value


@pytest.mark.skipif(not KILLS, reason="minutes long; `make faults` runs it, or set DEEPSTACK_SOAK_KILLS")
@pytest.mark.timeout(1800)
def test_soak(tmp_path: Path, record_fault: Callable[..., None]) -> None:
    steps = (KILLS + 1) * STEPS_PER_KILL
    undisturbed = fault_recipe(tmp_path, steps=steps, interval=INTERVAL)
    with TrainCommand(undisturbed) as command:
        assert command.end() == 0, command.text
    killed = replace(undisturbed, run_dir=str(tmp_path / "killed"))
    plan = kill_plan(KILLS, SEED)
    fallen, lost = soak(killed, plan)
    assert fallen == KILLS
    assert course_of(killed.run_dir) == course_of(undisturbed.run_dir)
    ours, theirs = tensors_of(killed, steps), tensors_of(undisturbed, steps)
    assert len(theirs) > 100
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    launchers = sum(rank is None for _, rank in plan)
    record_fault(
        fault=f"soak: {KILLS} kills in {steps} steps ({launchers} of the launcher)",
        found_after="at once",
        lost_steps=lost,
        outcome="parameters, optimizer and random states equal to the undisturbed run's, bit for bit",
    )
