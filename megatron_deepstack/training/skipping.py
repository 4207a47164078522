"""Leaving out a step whose loss or gradient is not finite.

Megatron's optimizers look for NaN and infinity only when they scale the loss, that is in fp16: with float32 or bf16
a single NaN reaches every parameter. Here the chain of optimizers asks before it touches anything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.optimizer import ChainedOptimizer

Trusted = Callable[[float], bool]
"""From this rank's global gradient norm to what all ranks decide alike: whether the step may be applied."""


class SkippingOptimizer(ChainedOptimizer):
    """Megatron's chain of optimizers, which leaves parameters, states and step counters alone if told so."""

    gradient_norm: float = 0.0
    """Global norm of the last step's gradients, before clipping; not finite if one of them is not."""
    trusted: Trusted

    def step_if(self, trusted: Trusted) -> bool:
        """Clip and apply the gradients, if `trusted` says so; whether it did. Collective over all ranks."""
        self.trusted = trusted
        applied, _, _ = self.step()
        return bool(applied)

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Megatron's hook before anything is changed; true leaves the step out."""
        found = super().prepare_grads()
        self.gradient_norm = float(super().get_grad_norm() or 0.0)
        return not self.trusted(self.gradient_norm) or found

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """The norm as `prepare_grads` measured it: once a step."""
        return self.gradient_norm
