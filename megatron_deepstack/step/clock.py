"""Where a step's time goes: data, encode, route, schedule, route back, encoder backward, finalise, optimizer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_deepstack.platform.compute.device import synchronize
from megatron_deepstack.platform.compute.stopwatch import Stopwatch
from megatron_deepstack.step.timeline import ENCODE, ENCODER_BACKWARD, Timeline

_OWN_WORK = (ENCODE, ENCODER_BACKWARD)
"""Parts in which a rank waits for no other; the passes of the schedule are timed apart (`step.work`)."""


class StepClock:
    """Seconds by part of the current step. Synchronises the device only while `exact` is set or a timeline is kept."""

    def __init__(self, *, exact: bool = False) -> None:
        self.exact = exact
        self.seconds: dict[str, float] = {}
        self.work = Stopwatch()
        """Own work: what this rank would take if no other were slow."""
        self.timeline: Timeline | None = None
        """Where the parts of this step are kept one by one; None in most steps."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the duration of the block to a part of the step.

        Args:
            name: The part; for those in which a rank waits for no other, the duration counts as own work too.
        """
        begin = self._now()
        if name in _OWN_WORK:
            self.work.start()
        try:
            yield
        finally:
            if name in _OWN_WORK:
                self.work.stop()
            self.add(name, self._now() - begin)

    def add(self, name: str, seconds: float) -> None:
        """Add a duration that was measured elsewhere and ends now.

        Args:
            name: The part of the step.
            seconds: Its duration.
        """
        if self.timeline is not None:
            self.timeline.ended(name, seconds)
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """The seconds of each part since the last call, by name; the next step begins with none."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _now(self) -> float:
        if self.exact or self.timeline is not None:
            synchronize()
        return time.perf_counter()
