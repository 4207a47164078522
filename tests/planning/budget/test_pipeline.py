"""Passes in Megatron's order: counts, what is in flight, and the bubble where a formula knows it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megatron_deepstack.planning.budget.pipeline import BACKWARD, FORWARD, Timeline, most_in_flight, simulate

LAYOUTS = [(1, 1, 3), (2, 1, 4), (4, 1, 8), (4, 1, 2), (2, 2, 4), (4, 2, 8), (4, 3, 12)]


def even(pipeline: int, virtual: int, count: int, message: float = 0.0) -> Timeline:
    """Forward passes of one second, backward passes of two."""
    forward, backward = ([[seconds] * count] * pipeline * virtual for seconds in (1.0, 2.0))
    return simulate(pipeline, virtual, forward, backward, message)


@pytest.mark.parametrize(("pipeline", "virtual", "count"), LAYOUTS)
def test_each_stage_runs_every_pass_once(pipeline: int, virtual: int, count: int) -> None:
    timeline = even(pipeline, virtual, count)
    for stage in range(pipeline):
        found = [(one.kind, one.micro_batch, one.chunk) for one in timeline.of_stage(stage)]
        assert len(set(found)) == len(found) == 2 * virtual * count
        for micro_batch in range(count):
            for chunk in range(virtual):
                assert found.index((FORWARD, micro_batch, chunk)) < found.index((BACKWARD, micro_batch, chunk))


@pytest.mark.parametrize(("pipeline", "virtual", "count"), LAYOUTS)
def test_the_bubble_is_the_known_one(pipeline: int, virtual: int, count: int) -> None:
    """Equal passes and no message time: (stages - 1) / chunks rounds of one forward and one backward."""
    timeline = even(pipeline, virtual, count)
    assert timeline.seconds == pytest.approx(3 * (count * virtual + pipeline - 1))
    for stage in range(pipeline):
        assert all(first.end <= second.begin for first, second in pairwise(timeline.of_stage(stage)))


def test_a_message_delays_the_next_stage() -> None:
    timeline = even(2, 1, 1, message=0.5)
    assert [one.begin for one in timeline.of_stage(1)] == [1.5, 2.5]
    assert timeline.of_stage(0)[-1].end == timeline.seconds == 7.0


def test_every_pass_has_its_own_duration() -> None:
    """Two chunks on one of two stages: a pass takes what is said of its place and micro-batch."""
    forward = [[10.0 * place + m for m in range(2)] for place in range(4)]
    timeline = simulate(2, 2, forward, [[0.5] * 2] * 4, 0.0)
    for stage in range(2):
        for one in timeline.of_stage(stage):
            expected = forward[one.chunk * 2 + stage][one.micro_batch] if one.kind == FORWARD else 0.5
            assert one.end - one.begin == pytest.approx(expected)


@pytest.mark.parametrize(("stage", "most"), [(0, 4), (1, 3), (3, 1)])
def test_earlier_stages_hold_more(stage: int, most: int) -> None:
    assert most_in_flight(4, 1, 8, stage) == ((most,),)


@pytest.mark.parametrize(("pipeline", "virtual", "count"), LAYOUTS)
def test_what_is_in_flight_is_what_the_passes_hold(pipeline: int, virtual: int, count: int) -> None:
    timeline = even(pipeline, virtual, count)
    for stage in range(pipeline):
        held, moments = [0] * virtual, list[tuple[int, ...]]()
        for one in timeline.of_stage(stage):
            held[one.chunk] += 1 if one.kind == FORWARD else -1
            moments.append(tuple(held))
        most = max(map(sum, moments))
        assert set(most_in_flight(pipeline, virtual, count, stage)) == {one for one in moments if sum(one) == most}
