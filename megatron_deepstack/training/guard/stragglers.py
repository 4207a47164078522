"""Slow ranks: whose own work takes longer than the others'.

In a synchronous run every rank's step takes as long as the slowest one's. What differs is a rank's *own work*: waiting
for its data, encoding, and the forward and backward passes of its micro-batches, as `step.clock` measures it, without
the pipeline's messages, routing, gradient reduction and optimizer. Ranks that share layers (tensor and context
parallel) meet within a pass, so that they show the same time and are named together. A pipeline stage that holds more
of the decoder than the median one may take longer in proportion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from megatron_deepstack.config.schema import HealthConfig
from megatron_deepstack.parallel.agree import gather_over_ranks


def slow_ranks(seconds: Sequence[float], weights: Sequence[int], factor: float) -> tuple[int, ...]:
    """Ranks that took more than `factor` times the median rank's time.

    A stage of twice the median size is allowed twice the time. A stage that is smaller than the median is not allowed
    less, because its ranks wait for data and encode as long as the others. The median of an even number of ranks is the
    lower of the two in the middle.

    Args:
        seconds: Time of each rank, in seconds.
        weights: Size of each rank's stage, in any unit.
        factor: How many times the median is too slow.

    Returns:
        The ranks, slowest first.
    """
    usual, size = median_low(seconds), max(1, median_low(weights))
    limits = [factor * usual * max(1.0, weight / size) for weight in weights]
    slow = [rank for rank, taken in enumerate(seconds) if taken > limits[rank]]
    return tuple(sorted(slow, key=lambda rank: -seconds[rank]))


@dataclass(slots=True)
class Stragglers:
    """Adds up a rank's own work and compares the ranks' every `straggler_window` steps."""

    config: HealthConfig
    hosts: Sequence[str]
    """Where each rank runs."""
    weights: Sequence[int]
    """The size of each rank's stage, in whatever unit."""
    _seconds: float = 0.0
    _steps: int = 0

    def take(self, seconds: float) -> tuple[tuple[int, ...], str]:
        """Add a step's own work; the slow ranks and a line about them, where it is time to compare.

        Collective over all ranks.
        """
        if not self.config.straggler_factor or not self.config.straggler_window:
            return (), ""
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        if self._steps < self.config.straggler_window:
            return (), ""
        per_step = [total / self._steps for total in gather_over_ranks(self._seconds)]
        self._seconds, self._steps = 0.0, 0
        slow = slow_ranks(per_step, self.weights, self.config.straggler_factor)
        return slow, self._line(slow, per_step) if slow else ""

    def _line(self, slow: Sequence[int], per_step: Sequence[float]) -> str:
        named = ", ".join(f"rank {rank} on {self.hosts[rank]} {per_step[rank] * 1e3:.0f} ms" for rank in slow)
        return (
            f"slow: {named} of own work a step, the median rank {median_low(per_step) * 1e3:.0f} ms "
            f"(last {self.config.straggler_window} steps)"
        )
