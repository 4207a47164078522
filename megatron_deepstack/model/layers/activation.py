"""The activation of a tower's MLP, fused with the bias before it.

Megatron-Core fuses bias and activation for the decoders that it knows, but not for CLIP's quick GELU without a gate.
Here the linear in front adds its bias and applies the activation in one compiled kernel; the MLP's own activation is
then the identity. Only the linear's output is kept for the backward pass, which computes the derivative from it.

Legend: x is the output of the linear without its bias, z = x + bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from megatron_deepstack.config.choices import Activation

Tensor = torch.Tensor
QUICK_GELU = 1.702
_TANH_GELU = 0.044715


def quick_gelu(z: Tensor) -> Tensor:
    """CLIP's activation, z * sigmoid(1.702 z)."""
    return z * torch.sigmoid(QUICK_GELU * z)


def gelu_tanh(z: Tensor) -> Tensor:
    """GELU by its approximation with tanh."""
    return F.gelu(z, approximate="tanh")


def identity(x: Tensor) -> Tensor:
    """What an MLP computes whose linear has applied the activation."""
    return x


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.QUICK_GELU: quick_gelu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: gelu_tanh,
    Activation.SILU: F.silu,
}


def _quick_gelu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(QUICK_GELU * z)
    return s * (1 + QUICK_GELU * z * (1 - s))


def _gelu_slope(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(z: Tensor) -> Tensor:
    root = math.sqrt(2 / math.pi)
    t = torch.tanh(root * z * (1 + _TANH_GELU * z * z))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * root * (1 + 3 * _TANH_GELU * z * z)


def _silu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


_SLOPES: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.QUICK_GELU: _quick_gelu_slope,
    Activation.GELU: _gelu_slope,
    Activation.GELU_TANH: _gelu_tanh_slope,
    Activation.SILU: _silu_slope,
}


def activate(x: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """Add a bias and apply an activation, in one compiled kernel each way; gradients flow to both.

    Args:
        x: (..., F), any float dtype. Sums and the activation are computed in float32.
        bias: (F,), of the same dtype.
        activation: What is applied.

    Returns:
        (..., F) in the dtype of `x`.
    """
    return _BiasActivation.apply(x, bias, activation)  # type: ignore[no-any-return, no-untyped-call]


class _BiasActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.activation = activation
        return _compiled_forward(activation)(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, bias = ctx.saved_tensors
        grad = _compiled_backward(ctx.activation)(grads[0], x, bias)
        return grad, grad.flatten(0, -2).sum(0), None


@cache
def _compiled_forward(activation: Activation) -> Callable[[Tensor, Tensor], Tensor]:
    function = ACTIVATIONS[activation]
    return torch.compile(lambda x, bias: function(x.float() + bias.float()).to(x.dtype), dynamic=True)


@cache
def _compiled_backward(activation: Activation) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    slope = _SLOPES[activation]
    return torch.compile(
        lambda grad, x, bias: (grad.float() * slope(x.float() + bias.float())).to(x.dtype), dynamic=True
    )


class ActivatedLinear(torch.nn.Module):
    """What an MLP's first linear adds to Megatron's or Transformer Engine's; comes before it among the bases."""

    activation: Activation

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """(S, B, C) to the activated (S, B, F / tp), and no bias: it is in there."""
        output, bias = super().forward(x)
        return activate(output, bias, self.activation), None


@cache
def activated(linear: type, activation: Activation | None) -> type:
    """A linear that applies an activation to its own output.

    Args:
        linear: The class of a linear, which must be built to leave its bias to the caller (`skip_bias_add`).
        activation: What it applies; None returns the class unchanged.

    Returns:
        The class itself or a subclass, the same one for the same arguments.
    """
    if activation is None:
        return linear
    return type(f"Activated{linear.__name__}", (ActivatedLinear, linear), {"activation": activation})
