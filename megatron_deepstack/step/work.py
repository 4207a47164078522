"""A rank's own work inside the schedule: Megatron's timers, of which only the forward and backward passes count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.platform.compute.stopwatch import Stopwatch

_PASSES = ("forward-compute", "backward-compute")


class _Ignored:
    """Megatron's other timers, which would add barriers of their own."""

    def start(self, **_: Any) -> None:
        """Does nothing."""

    def stop(self, **_: Any) -> None:
        """Does nothing."""


class WorkTimers:
    """What `TransformerConfig.timers` may be: the schedules call it with a name, then `start` and `stop`."""

    def __init__(self, work: Stopwatch) -> None:
        self.work = work
        self._ignored = _Ignored()

    def __call__(self, name: str, log_level: int | None = None) -> Stopwatch | _Ignored:
        return self.work if name in _PASSES else self._ignored


@contextmanager
def untimed(config: TransformerConfig) -> Iterator[None]:
    """Run passes that belong to no training step: validation, or answers while training.

    Args:
        config: The decoder's, whose timers count nothing of the block.

    Yields:
        Nothing.
    """
    timers, config.timers = config.timers, None
    try:
        yield
    finally:
        config.timers = timers
