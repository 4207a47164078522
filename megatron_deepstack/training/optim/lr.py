"""Learning rate as a pure function of the step, so that resuming has nothing to restore."""

from __future__ import annotations

import math

from megatron_deepstack.config.choices import LrSchedule
from megatron_deepstack.config.schema import OptimizerConfig


def warmup_steps(config: OptimizerConfig, num_steps: int) -> int:
    """Steps of linear rise, `warmup_fraction` of all, rounded up as Hugging Face's trainer does."""
    return math.ceil(config.warmup_fraction * num_steps)


def learning_rate(config: OptimizerConfig, step: int, num_steps: int, peak: float) -> float:
    """Rate of 0-based step `step`: rising linearly from peak / warm-up steps to `peak`, then as the schedule says."""
    warmup = warmup_steps(config, num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule is LrSchedule.CONSTANT:
        return peak
    progress = (step - warmup) / max(num_steps - 1 - warmup, 1)
    share = 1.0 - progress if config.schedule is LrSchedule.LINEAR else 0.5 * (1.0 + math.cos(math.pi * progress))
    low = min(config.min_lr, peak)
    return low + (peak - low) * share
