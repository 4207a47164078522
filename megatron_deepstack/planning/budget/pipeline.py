"""The pipeline's passes in the order in which Megatron-Core runs them, simulated with durations and message times.

A pass is the forward or backward of one micro-batch through one chunk. Each stage runs its passes one after another, in
an order that the schedule fixes: none, 1F1B, or interleaved. A pass begins when the stage is free and what it needs has
arrived from the neighbour. So the simulation gives what a formula cannot: uneven stages and uneven micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Seconds = Sequence[Sequence[float]]
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True, slots=True)
class TimedPass:
    """A pass with its times in seconds from the beginning of the schedule."""

    kind: str
    micro_batch: int
    chunk: int
    begin: float
    end: float


def _warm_up(pipeline: int, virtual: int, num_micro_batches: int, stage: int) -> int:
    """Return the number of forward passes of a stage before its first backward, but for the one just before it."""
    if pipeline == 1:
        return 0
    wanted = pipeline - stage - 1 if virtual == 1 else (pipeline - stage - 1) * 2 + (virtual - 1) * pipeline
    return min(wanted, num_micro_batches * virtual)


def _place(number: int, pipeline: int, virtual: int, *, backward: bool = False) -> tuple[int, int]:
    """Return micro-batch and chunk of a stage's k-th forward or backward pass.

    Under interleaving `pipeline` micro-batches at a time go through one chunk after another.
    """
    if virtual == 1:
        return number, 0
    round_, within = divmod(number, pipeline * virtual)
    chunk, micro_batch = divmod(within, pipeline)
    return round_ * pipeline + micro_batch, virtual - 1 - chunk if backward else chunk


def forward_passes(pipeline: int, virtual: int, num_micro_batches: int) -> list[tuple[int, int]]:
    """List the forward passes of a stage in their order, which is the same on all stages.

    Args:
        pipeline: Number of stages.
        virtual: Chunks of each stage.
        num_micro_batches: M.

    Returns:
        Micro-batch and chunk of each of M x chunks passes.
    """
    return [_place(number, pipeline, virtual) for number in range(num_micro_batches * virtual)]


def _numbers(pipeline: int, virtual: int, num_micro_batches: int, stage: int) -> list[int]:
    """List the passes of one stage in the order of Megatron-Core's schedules, by their numbers; see `_Order`."""
    total, forwards = num_micro_batches * virtual, num_micro_batches * virtual * pipeline
    before = _warm_up(pipeline, virtual, num_micro_batches, stage)
    there = forward_passes(pipeline, virtual, num_micro_batches)
    back = [_place(number, pipeline, virtual, backward=True) for number in range(total)]
    first = [(chunk * pipeline + stage) * num_micro_batches + m for m, chunk in there]
    second = [forwards + (chunk * pipeline + stage) * num_micro_batches + m for m, chunk in back]
    steady = [one for pair in zip(first[before:], second, strict=False) for one in pair]
    return [*first[:before], *steady, *second[total - before :]]


@lru_cache(maxsize=1024)
def most_in_flight(pipeline: int, virtual: int, num_micro_batches: int, stage: int) -> tuple[tuple[int, ...], ...]:
    """Find for which chunks a stage holds activations at its fullest moments.

    After its warm-up a stage runs a forward and a backward pass in turn, so it holds most after every forward. Which
    chunks these are repeats with each round of micro-batches through all chunks.

    Args:
        pipeline: Number of stages.
        virtual: Chunks of each stage.
        num_micro_batches: M.
        stage: Number of the stage.

    Returns:
        Numbers of micro-batches by chunk, of each such moment, each once.
    """
    total = num_micro_batches * virtual
    before = _warm_up(pipeline, virtual, num_micro_batches, stage)
    held, found = [0] * virtual, dict[tuple[int, ...], None]()
    for number in range(min(before + 1 + pipeline * virtual, total)):
        if number > before:
            held[_place(number - before - 1, pipeline, virtual, backward=True)[1]] -= 1
        held[_place(number, pipeline, virtual)[1]] += 1
        if number >= min(before, total - 1):
            found[tuple(held)] = None
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Order:
    """All passes of a schedule in an order in which each comes after those that it waits for.

    Pass m of place p has the number `p * M + m` if it is a forward, and as many more as there are forwards if it is a
    backward. Chunks are numbered by place: `chunk * pipeline + stage`.
    """

    numbers: tuple[int, ...]
    stages: tuple[int, ...]
    needs: tuple[int, ...]
    """The number of the pass whose message each waits for; that of no pass, which is the number of all passes, if it
    waits for none."""


@lru_cache(maxsize=64)
def _order(pipeline: int, virtual: int, num_micro_batches: int) -> _Order:
    num_chunks, m = pipeline * virtual, num_micro_batches
    forwards = num_chunks * m
    done, next_of = [False] * (2 * forwards) + [True], [0] * pipeline
    orders = [_numbers(pipeline, virtual, m, stage) for stage in range(pipeline)]
    found: list[tuple[int, int, int]] = []
    while len(found) < 2 * forwards:
        before = len(found)
        for stage, order in enumerate(orders):
            at = next_of[stage]
            while at < len(order):
                number = order[at]
                place = number % forwards // m
                if number < forwards:
                    need = number - m if place else 2 * forwards
                else:
                    need = number + m if place < num_chunks - 1 else 2 * forwards
                if not done[need]:
                    break
                done[number] = True
                found.append((number, stage, need))
                at += 1
            next_of[stage] = at
        assert len(found) > before, "the schedule waits for itself"
    return _Order(*zip(*found, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """A simulated schedule."""

    pipeline: int
    virtual: int
    num_micro_batches: int
    begins: Sequence[float]
    """When each pass begins, by its number (see `_Order`), in seconds from the beginning of the schedule."""
    ends: Sequence[float]
    """When each ends."""

    @property
    def seconds(self) -> float:
        """The whole schedule."""
        return max(self.ends, default=0.0)

    def of_stage(self, stage: int) -> list[TimedPass]:
        """List the passes of a stage in their order.

        Args:
            stage: Number of the stage.

        Returns:
            The passes with their times.
        """
        found, m = [], self.num_micro_batches
        forwards = self.pipeline * self.virtual * m
        for number in _numbers(self.pipeline, self.virtual, m, stage):
            place, micro_batch = divmod(number % forwards, m)
            kind, chunk = FORWARD if number < forwards else BACKWARD, place // self.pipeline
            found.append(TimedPass(kind, micro_batch, chunk, self.begins[number], self.ends[number]))
        return found


def simulate(pipeline: int, virtual: int, forward: Seconds, backward: Seconds, message_seconds: float) -> Timeline:
    """Run the schedule.

    Args:
        pipeline: Number of stages.
        virtual: Chunks of each stage.
        forward: Durations of forward passes: of each place (`chunk * pipeline + stage`) those of the M micro-batches.
            Under interleaving M is a multiple of the stages.
        backward: The same of backward passes.
        message_seconds: From the end of a pass to the arrival of its output at the neighbour.

    Returns:
        The passes of each stage with their times.
    """
    order = _order(pipeline, virtual, len(forward[0]))
    durations = [seconds for some in (*forward, *backward) for seconds in some]
    message = message_seconds if pipeline > 1 else 0.0
    begins, ends, free = [0.0] * len(durations), [0.0] * len(durations), [0.0] * pipeline
    ends.append(-message)  # of the pass that no other waits for
    for number, stage, need in zip(order.numbers, order.stages, order.needs, strict=True):
        ready, begin = ends[need] + message, free[stage]
        if ready > begin:
            begin = ready
        begins[number] = begin
        ends[number] = free[stage] = begin + durations[number]
    return Timeline(pipeline, virtual, len(forward[0]), begins, ends[:-1])
