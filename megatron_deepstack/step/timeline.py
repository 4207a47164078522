"""What a rank did at what time, in one step: intervals of its parts, and of each micro-batch's forward and backward.

Megatron's schedule runs unchanged. A forward is timed where the schedule calls our forward step. A backward begins when
the gradient of a chunk's output arrives, as a hook on that output notices, and ends with the autograd run that the
hook is part of. The rest of the schedule's time is waiting for a neighbour and sending to it. Times are
those of the host's monotonic clock, taken when the device is idle: a recorded step is slower than others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_deepstack.platform.compute.device import synchronize

FORWARD, BACKWARD, ENCODE, ENCODER_BACKWARD = "forward", "backward", "encode", "encoder backward"


@dataclass(frozen=True, slots=True)
class Interval:
    """One thing a rank did."""

    kind: str
    """A part of the step as the clock names it, `forward` or `backward`."""
    begin_ns: int
    end_ns: int
    micro_batch: int | None = None
    """None where it concerns the whole step."""
    vpp: int = 0
    """Virtual stage."""


@dataclass(frozen=True, slots=True)
class _Running:
    """A backward that has begun."""

    kind: str
    begin_ns: int
    micro_batch: int
    vpp: int


class Timeline:
    """Intervals of one step on this rank, in order of their ends."""

    def __init__(self) -> None:
        self.intervals: list[Interval] = []
        self._running: _Running | None = None

    @contextmanager
    def part(self, kind: str, micro_batch: int | None = None, vpp: int = 0) -> Iterator[None]:
        """Record the block as one interval.

        Args:
            kind: What is done in it.
            micro_batch: Its number in the step, from 0; None where the block concerns the whole step.
            vpp: Virtual stage.
        """
        begin = _now()
        yield
        self.intervals.append(Interval(kind, begin, _now(), micro_batch, vpp))

    def ended(self, kind: str, seconds: float) -> None:
        """Record what ends now.

        Args:
            kind: What was done.
            seconds: How long it took.
        """
        now = _now()
        self.intervals.append(Interval(kind, now - round(seconds * 1e9), now))

    def watch_backward(self, output: torch.Tensor, micro_batch: int, vpp: int) -> None:
        """Record the backward that will begin with the gradient of a chunk's output.

        Args:
            output: What the chunk returned; nothing is recorded if it has no graph.
            micro_batch: Its number in the step, from 0.
            vpp: Virtual stage.
        """
        if output.requires_grad:
            output.register_hook(lambda _: self._begin(micro_batch, vpp))

    def watch_encoder_backward(self, rows: torch.Tensor) -> None:
        """Record the rest of a backward as the encoder's, from the moment when the gradient of `rows` arrives."""
        if rows.requires_grad:
            rows.register_hook(lambda _: self._reach_encoder())

    def _begin(self, micro_batch: int, vpp: int) -> None:
        self._running = _Running(BACKWARD, _now(), micro_batch, vpp)
        torch.autograd.Variable._execution_engine.queue_callback(self._end)  # called when this backward is over

    def _reach_encoder(self) -> None:
        """The decoder's nodes came later in the forward, so their backward is over when the encoder's begins."""
        running = self._running
        if running is not None:
            self._end()
            self._running = _Running(ENCODER_BACKWARD, _now(), running.micro_batch, running.vpp)

    def _end(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            self.intervals.append(Interval(running.kind, running.begin_ns, _now(), running.micro_batch, running.vpp))


def _now() -> int:
    synchronize()
    return time.perf_counter_ns()
