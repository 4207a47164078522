"""Learning rate as a pure function of the step, so that resuming has nothing to restore."""

from __future__ import annotations

import math

from megatron_deepstack.config.choices import LrSchedule
from megatron_deepstack.config.schema import OptimizerConfig


def warmup_steps(config: OptimizerConfig, num_steps: int) -> int:
    """Number of steps in which the rate rises.

    Args:
        config: Gives `warmup_fraction`.
        num_steps: Steps of the whole run.

    Returns:
        The fraction of all steps, rounded up as Hugging Face does.
    """
    return math.ceil(config.warmup_fraction * num_steps)


def learning_rate(config: OptimizerConfig, step: int, num_steps: int, peak: float) -> float:
    """Learning rate of a step.

    It rises linearly from `peak` / warm-up steps to `peak`, and then follows the schedule.

    Args:
        config: Schedule, warm-up and lowest rate.
        step: The step, 0-based.
        num_steps: Steps of the whole run.
        peak: The highest rate.

    Returns:
        The rate.
    """
    warmup = warmup_steps(config, num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule is LrSchedule.CONSTANT:
        return peak
    progress = (step - warmup) / max(num_steps - 1 - warmup, 1)
    share = 1.0 - progress if config.schedule is LrSchedule.LINEAR else 0.5 * (1.0 + math.cos(math.pi * progress))
    low = min(config.min_lr, peak)
    return low + (peak - low) * share
