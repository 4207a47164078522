"""Leaving out a step whose loss or gradient is not finite, and scaling and clipping gradients in one pass.

Megatron's optimizers look for NaN and infinity only when they scale the loss, that is in fp16: with float32 or bf16
a single NaN reaches every parameter. Here the chain of optimizers asks before it touches anything.

Megatron would divide whole buffers by the number of targets, and then write the gradients twice to clip them. Here both
factors are multiplied into the gradients that this rank updates, in place and once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

Trusted = Callable[[float], bool]
"""From the global gradient norm to whether the step may be applied; all ranks must decide the same."""


class SkippingOptimizer(ChainedOptimizer):
    """Megatron's chain of optimizers, which can leave out a step and then changes no parameters, states or counters."""

    gradient_norm: float = 0.0
    """Global norm of the last step's gradients, before clipping; not finite if one of them is not."""
    trusted: Trusted
    scale: float = 1.0
    clip: float = 0.0

    def step_if(self, trusted: Trusted, *, scale: float = 1.0, clip: float = 0.0) -> bool:
        """Scale, clip and apply the gradients if they are trusted. Collective over all ranks.

        Args:
            trusted: Called once with the norm; NaN if some gradient is not finite. All ranks must decide the same.
            scale: What the gradients are multiplied by first, the same on all ranks.
            clip: Largest global norm of the scaled gradients; larger ones are scaled down to it. 0 for no bound.

        Returns:
            Whether the gradients were applied.
        """
        self.trusted, self.scale, self.clip = trusted, scale, clip
        applied, _, _ = self.step()
        return bool(applied)

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Megatron's hook before anything is changed; true leaves the step out."""
        found = super().prepare_grads()
        self.gradient_norm = self.scale * float(super().get_grad_norm() or 0.0)
        sound = all(_rest_is_finite(single) for single in self.chained_optimizers)
        if found or not self.trusted(self.gradient_norm if sound else math.nan):
            return True
        self._scale_and_clip()
        return False

    def _scale_and_clip(self) -> None:
        """Multiply what this rank updates by both factors."""
        factor = self.scale
        if self.clip:
            factor *= min(self.clip / (self.gradient_norm + 1e-6), 1.0)  # Megatron's and PyTorch's small number
        if factor == 1.0:
            return
        parameters = [parameter for single in self.chained_optimizers for parameter in single.get_parameters()]
        found = [_gradient(parameter) for parameter in parameters]
        gradients = [gradient for gradient in found if gradient is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """The norm as `prepare_grads` measured it: once a step."""
        return self.gradient_norm


def _rest_is_finite(single: MegatronOptimizer) -> bool:
    """Whether the gradients that this rank leaves out of the norm are finite.

    They belong to parameters that all tensor-parallel ranks hold, of which only the first rank's count. If the memory
    of another rank is damaged, the norm does not show it.
    """
    # Megatron-Core renamed it after 0.16.
    in_norm = getattr(single, "get_main_grads_for_grad_norm", None) or single.get_grads_for_grad_norm
    counted = {gradient.data_ptr() for gradient in in_norm()}
    found = [_gradient(parameter) for parameter in single.get_parameters()]
    gradients = [gradient for gradient in found if gradient is not None]
    rest = [gradient for gradient in gradients if gradient.data_ptr() not in counted]
    return not rest or math.isfinite(float(torch.stack(torch._foreach_norm(rest)).sum()))


def _gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """A parameter's gradient; where the two may differ in dtype Megatron keeps it beside the parameter's own place."""
    beside: torch.Tensor | None = getattr(parameter, "decoupled_grad", None)
    return parameter.grad if beside is None else beside
