"""The activation of a gated MLP without fused kernels: SiLU of one half of a linear's output times the other half.

Megatron-Core cuts the halves apart, and automatic differentiation joins their gradients again, which writes both once
more. Here each half of the gradient is written to its place. Only the linear's output is kept for the backward pass.

Legend: x is the output of the linear, its first half the gate, F the width of a half on this tp rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig


class GatedSilu(torch.nn.Module):
    """In the place that Megatron's MLP has for an activation of its own (`use_te_activation_func`)."""

    def __init__(self, config: TransformerConfig) -> None:
        """Make one; it has no parameters and needs nothing of the config."""
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the activation; gradients flow.

        Args:
            x: (..., 2 F), any float dtype.

        Returns:
            (..., F) in the same dtype; the same bits as `silu(gate) * other` in separate operators.
        """
        return _GatedSilu.apply(x)  # type: ignore[no-any-return, no-untyped-call]

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Say that a checkpoint keeps nothing of it; Megatron's MLP asks all of its parts.

        Args:
            *args: What Megatron passes.
            **kwargs: The same.

        Returns:
            Nothing.
        """
        return {}


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, other = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(other)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        gate, other = x.chunk(2, dim=-1)
        found = torch.empty_like(x)
        of_gate, of_other = found.chunk(2, dim=-1)
        scratch = F.silu(gate)
        torch.mul(grads[0], scratch, out=of_other)
        torch.mul(grads[0], other, out=scratch)
        torch.ops.aten.silu_backward.grad_input(scratch, gate, grad_input=of_gate)
        return found
