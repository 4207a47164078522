"""A stopwatch for work on the device, which does not make the host wait while it runs."""

from __future__ import annotations

import time
from typing import Any

import torch

from megatron_deepstack.platform.compute.device import has_gpu


class Stopwatch:
    """Adds up intervals. On a GPU it uses CUDA events, since kernels run later than the calls that start them."""

    def __init__(self) -> None:
        self._on_device = has_gpu()
        self._events: list[tuple[Any, Any]] = []
        self._seconds = 0.0
        self._begin: Any = None

    def start(self) -> None:
        """Begin an interval; the previous one must have ended."""
        self._begin = self._now()

    def stop(self) -> None:
        """End the interval."""
        assert self._begin is not None, "stopped before it was started"
        begin, self._begin = self._begin, None
        if self._on_device:
            self._events.append((begin, self._now()))
        else:
            self._seconds += self._now() - begin

    def take(self) -> float:
        """Return the seconds of all intervals since the last call; wait until the device has finished them."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000.0
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds

    def _now(self) -> Any:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
