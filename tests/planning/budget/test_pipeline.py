"""Passes in Megatron's order: counts, what is in flight, and the bubble where a formula knows it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.planning.budget.pipeline import BACKWARD, FORWARD, Pass, most_in_flight, passes, simulate

LAYOUTS = [(1, 1, 3), (2, 1, 4), (4, 1, 8), (4, 1, 2), (2, 2, 4), (4, 2, 8), (4, 3, 12)]


def seconds(one: Pass, stage: int) -> float:
    return 1.0 if one.kind == FORWARD else 2.0


@pytest.mark.parametrize(("pipeline", "virtual", "count"), LAYOUTS)
def test_each_stage_runs_every_pass_once(pipeline: int, virtual: int, count: int) -> None:
    for stage in range(pipeline):
        found = passes(pipeline, virtual, count, stage)
        assert len(set(found)) == len(found) == 2 * virtual * count
        for micro_batch in range(count):
            for chunk in range(virtual):
                forward = found.index(Pass(FORWARD, micro_batch, chunk))
                assert forward < found.index(Pass(BACKWARD, micro_batch, chunk))


@pytest.mark.parametrize(("pipeline", "virtual", "count"), LAYOUTS)
def test_the_bubble_is_the_known_one(pipeline: int, virtual: int, count: int) -> None:
    """Equal passes and no message time: (stages - 1) / chunks rounds of one forward and one backward."""
    parallel = ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual)
    timed = simulate(parallel, count, seconds, 0.0)
    assert max(stage[-1].end for stage in timed) == pytest.approx(3 * (count * virtual + pipeline - 1))
    for stage in timed:
        assert all(first.end <= second.begin for first, second in pairwise(stage))


def test_a_message_delays_the_next_stage() -> None:
    timed = simulate(ParallelConfig(pipeline=2), 1, seconds, 0.5)
    assert [one.begin for one in timed[1]] == [1.5, 2.5]
    assert timed[0][-1].end == 7.0


@pytest.mark.parametrize(("stage", "most"), [(0, 4), (1, 3), (3, 1)])
def test_earlier_stages_hold_more(stage: int, most: int) -> None:
    moments = most_in_flight(ParallelConfig(pipeline=4), 8, stage)
    assert max(sum(held.values()) for held in moments) == most
