"""Slow ranks are named by their own work, not by the time they wait for others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_deepstack.config.schema import DataConfig, HealthConfig, ParallelConfig, Recipe
from megatron_deepstack.platform.compute.stopwatch import Stopwatch
from megatron_deepstack.step.work import WorkTimers
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_recipe
from megatron_deepstack.testing.tiny_store import write_tiny_store
from megatron_deepstack.training.guard.stragglers import Stragglers, slow_ranks

Pools = Callable[[int], RankPool]
SLOW_SECONDS = 1.0


@dataclass
class Clock:
    """Stands in for the module `time`: it goes on by a millisecond a reading, and by what is slept, on any machine."""

    seconds: float = 0.0

    def perf_counter(self) -> float:
        self.sleep(0.001)
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.mark.parametrize(
    ("seconds", "named"),
    [
        ((1.0, 1.0, 1.0, 1.0), ()),
        ((1.0, 1.4, 1.0, 1.0), ()),
        ((1.0, 1.0, 1.6, 1.0), (2,)),
        ((1.0, 3.0, 1.6, 1.0), (1, 2)),
        ((1.0, 2.0), (1,)),
        ((5.0,), ()),
    ],
)
def test_slow_ranks(seconds: tuple[float, ...], named: tuple[int, ...]) -> None:
    assert slow_ranks(seconds, [7] * len(seconds), 1.5) == named


@pytest.mark.parametrize(
    ("seconds", "weights", "named"),
    [
        ((1.0, 2.5), (10, 20), ()),
        ((1.0, 3.5), (10, 20), (1,)),
        ((1.0, 1.0, 1.0, 1.6), (10, 10, 10, 2), (3,)),
        ((1.0, 1.2, 1.0, 3.5), (0, 10, 10, 20), (3,)),
        ((1.0, 1.0, 1.6), (0, 0, 0), (2,)),
    ],
)
def test_a_larger_stage_may_take_longer(
    seconds: tuple[float, ...], weights: tuple[int, ...], named: tuple[int, ...]
) -> None:
    assert slow_ranks(seconds, weights, 1.5) == named


@pytest.mark.parametrize("config", [HealthConfig(straggler_factor=0), HealthConfig(straggler_window=0)])
def test_never_is_never(config: HealthConfig) -> None:
    """Nothing is compared, so nothing is collective."""
    stragglers = Stragglers(config, ["here"], [1])
    assert all(stragglers.take(1.0) == ((), "") for _ in range(100))


def test_only_passes_count() -> None:
    work = Stopwatch()
    timers = WorkTimers(work)
    assert timers("forward-compute", log_level=2) is work
    assert timers("backward-compute", log_level=2) is work
    other = timers("forward-recv", log_level=2)
    assert other is not work
    other.start(barrier=True)
    other.stop()
    assert work.take() == 0.0


def _slow_down(session: Any, where: str, clock: Clock) -> None:
    """Let one part of this rank's own work take longer."""
    if where == "data":
        load = session.reader.load
        session.reader.load = lambda step: (clock.sleep(SLOW_SECONDS), load(step))[1]
    else:
        module = {"encode": session.engine.model.encoder, "layers": session.engine.model.chunks[0]}[where]
        module.register_forward_pre_hook(lambda *_: clock.sleep(SLOW_SECONDS))


def _train_with_a_slow_rank(rank: int, recipe: Recipe, slow: int, where: str) -> None:
    from megatron_deepstack.platform.compute import stopwatch
    from megatron_deepstack.training import loop

    clock, start = Clock(), loop.start_session

    def start_slow(*args: Any) -> Any:
        session = start(*args)
        if rank == slow:
            _slow_down(session, where, clock)
        return session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "start_session", start_slow)
        patch.setattr(loop, "time", clock)
        patch.setattr(stopwatch, "time", clock)
        loop.run(recipe, groups_for(recipe.parallel))


@pytest.mark.parametrize(("slow", "where"), [(0, "data"), (1, "encode"), (1, "layers")])
def test_a_slow_rank_is_named(ranks: Pools, tmp_path: Path, slow: int, where: str) -> None:
    """Of two stages the other one waits just as long for each step, and is not named."""
    store = write_tiny_store(tmp_path / "store.zarr")
    recipe = tiny_recipe(parallel=ParallelConfig(pipeline=2))
    recipe = replace(
        recipe,
        data=DataConfig(store=str(store)),
        run_dir=str(tmp_path / "run"),
        health=replace(recipe.health, straggler_window=3, straggler_factor=2.0),
    )
    ranks(2).run(_train_with_a_slow_rank, recipe, slow, where)
    records = [json.loads(line) for line in Path(recipe.run_dir, "metrics.jsonl").read_text().splitlines()]
    assert [tuple(record["slow_ranks"]) for record in records] == [(), (), (slow,)]
