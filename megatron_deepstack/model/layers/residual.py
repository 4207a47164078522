"""The addition of what attention or MLP computes to the hidden states, with a factor, as in Granite.

It takes the place of Megatron's `get_bias_dropout_add` in a layer spec, so the layer itself is Megatron's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Addition = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]


def scaled_addition(factor: float) -> Callable[[bool, bool], Addition]:
    """Return what a layer spec names as `self_attn_bda` or `mlp_bda`.

    Args:
        factor: Factor of what is added.

    Returns:
        A function of (training, fused) to the addition, which takes an output with its bias, the hidden states, and a
        dropout probability, which is 0 here.
    """

    def add(
        output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        assert not dropout, "layers have no dropout here"
        output, bias = output_with_bias
        return residual + (output if bias is None else output + bias) * factor

    def choose(training: bool, fused: bool) -> Addition:
        return add

    return choose
