"""Linears of a model that answers on one tensor-parallel rank, without what serves gradients and other ranks.

Megatron's linears pass every input and output through autograd functions that would exchange with other ranks. With one
rank and without gradients they change nothing, and for a step of one token they take longer than the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


def simplify_linears(module: torch.nn.Module) -> None:
    """Let Megatron's own linears compute the product alone. Their parameters stay, and gradients flow no more.

    Args:
        module: A model without tensor parallelism that is not trained; changed in place. Linears of other kinds, such
            as Transformer Engine's or those beside an adapter, stay as they are.
    """
    for linear in module.modules():
        if type(linear) in (ColumnParallelLinear, RowParallelLinear):
            linear.forward = _product_of(linear)


def _product_of(linear: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """The product as such a linear returns it, with the bias beside if the caller adds that."""

    def forward(
        input_: torch.Tensor, weight: torch.Tensor | None = None, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        added, beside = (None, linear.bias) if linear.skip_bias_add else (linear.bias, None)
        return F.linear(input_, linear.weight if weight is None else weight, added), beside

    return forward
