"""The pipeline's passes in the order in which Megatron-Core runs them, simulated with durations and message times.

A pass is the forward or backward of one micro-batch through one chunk. Each stage runs its passes one after another, in
an order that the schedule fixes: none, 1F1B, or interleaved. A pass begins when the stage is free and what it needs has
arrived from the neighbour. So the simulation gives what a formula cannot: uneven stages and uneven micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from megatron_deepstack.config.schema import ParallelConfig

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a stage."""

    kind: str
    """FORWARD or BACKWARD."""
    micro_batch: int
    chunk: int
    """Virtual stage."""


@dataclass(frozen=True, slots=True)
class TimedPass:
    """A pass with its times in seconds from the beginning of the schedule."""

    kind: str
    micro_batch: int
    chunk: int
    begin: float
    end: float


@lru_cache(maxsize=256)
def passes(pipeline: int, virtual: int, num_micro_batches: int, stage: int) -> tuple[Pass, ...]:
    """List the passes of one stage in the order of Megatron-Core's schedules.

    Args:
        pipeline: Number of stages.
        virtual: Chunks of each stage.
        num_micro_batches: M.
        stage: Number of the stage.

    Returns:
        2 x M x chunks passes.
    """
    total = num_micro_batches * virtual
    if pipeline == 1:
        warm_up = 0
    elif virtual == 1:
        warm_up = min(pipeline - stage - 1, total)
    else:
        warm_up = min((pipeline - stage - 1) * 2 + (virtual - 1) * pipeline, total)
    forwards = [_numbered(FORWARD, k, pipeline, virtual) for k in range(total)]
    backwards = [_numbered(BACKWARD, k, pipeline, virtual) for k in range(total)]
    steady = [one for pair in zip(forwards[warm_up:], backwards, strict=False) for one in pair]
    return (*forwards[:warm_up], *steady, *backwards[total - warm_up :])


def _numbered(kind: str, number: int, pipeline: int, virtual: int) -> Pass:
    """Return the k-th forward or backward of a stage: rounds of `pipeline` micro-batches through one chunk each."""
    if virtual == 1:
        return Pass(kind, number, 0)
    round_, within = divmod(number, pipeline * virtual)
    chunk = within // pipeline
    return Pass(kind, round_ * pipeline + within % pipeline, chunk if kind == FORWARD else virtual - 1 - chunk)


@lru_cache(maxsize=256)
def most_in_flight(parallel: ParallelConfig, num_micro_batches: int, stage: int) -> tuple[dict[int, int], ...]:
    """Find for which chunks a stage holds activations at its fullest moments.

    Args:
        parallel: The layout.
        num_micro_batches: M.
        stage: Number of the stage.

    Returns:
        Numbers of micro-batches by chunk, of each moment in which more are held than before.
    """
    held: dict[int, int] = {}
    found: list[dict[int, int]] = []
    most = 0
    for one in passes(parallel.pipeline, parallel.virtual_pipeline, num_micro_batches, stage):
        held[one.chunk] = held.get(one.chunk, 0) + (1 if one.kind == FORWARD else -1)
        if sum(held.values()) >= most and one.kind == FORWARD:
            most = sum(held.values())
            if held not in found:
                found.append(dict(held))
    return tuple(found)


def simulate(
    parallel: ParallelConfig,
    num_micro_batches: int,
    seconds: Callable[[Pass, int], float],
    message_seconds: float,
) -> list[list[TimedPass]]:
    """Run the schedule.

    Args:
        parallel: The layout.
        num_micro_batches: M; under interleaving a multiple of the stages.
        seconds: Duration of a pass on a stage.
        message_seconds: From the end of a pass to the arrival of its output at the neighbour.

    Returns:
        The passes of each stage with their times.
    """
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    orders = [passes(pipeline, virtual, num_micro_batches, stage) for stage in range(pipeline)]
    ends: dict[tuple[str, int, int], float] = {}
    next_of, free = [0] * pipeline, [0.0] * pipeline
    timed: list[list[TimedPass]] = [[] for _ in range(pipeline)]
    left = sum(map(len, orders))
    while left:
        before = left
        for stage in range(pipeline):
            while next_of[stage] < len(orders[stage]):
                one = orders[stage][next_of[stage]]
                place = one.chunk * pipeline + stage
                ready = _ready(ends, one, place, pipeline * virtual, message_seconds, pipeline)
                if ready is None:
                    break
                begin = max(free[stage], ready)
                end = begin + seconds(one, stage)
                ends[one.kind, one.micro_batch, place] = free[stage] = end
                timed[stage].append(TimedPass(one.kind, one.micro_batch, one.chunk, begin, end))
                next_of[stage] += 1
                left -= 1
        assert left < before, "the schedule waits for itself"
    return timed


def _ready(
    ends: dict[tuple[str, int, int], float], one: Pass, place: int, num_chunks: int, message: float, pipeline: int
) -> float | None:
    """Return when a pass has all that it needs; None if that is not known yet."""
    message = message if pipeline > 1 else 0.0
    if one.kind == FORWARD:
        if place == 0:
            return 0.0
        end = ends.get((FORWARD, one.micro_batch, place - 1))
        return None if end is None else end + message
    own = ends.get((FORWARD, one.micro_batch, place))
    if own is None or place == num_chunks - 1:
        return own
    end = ends.get((BACKWARD, one.micro_batch, place + 1))
    return None if end is None else max(end + message, own)
