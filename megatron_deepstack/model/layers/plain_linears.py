"""Linears of a model that answers on one tensor-parallel rank, without what serves gradients and other ranks.

Megatron's linears pass every input and output through autograd functions that would exchange with other ranks. With one
rank and without gradients they change nothing, and for a step of one token they take longer than the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

FEW_ROWS: Final = 3
"""Rows of a product, on a CPU in float32, for which the weight times their transpose is faster. Measured with MKL on
one core: two rows of 1024 to 5632 in 1.2 ms and not 3.8, three in 1.7 and not 5.8; four are as fast or slower."""
FEW_ROWS_OF_HEAD: Final = 4
"""The same for an output layer: four rows of 1024 to 32000 in 18 ms and not 27, eight are not faster."""


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, few: int = FEW_ROWS
) -> torch.Tensor:
    """A linear's product, in whichever of two orders is faster. No gradient flows.

    Args:
        x: (..., inputs).
        weight: (outputs, inputs).
        bias: (outputs,), or None.
        few: Most rows that are multiplied from the other side.

    Returns:
        (..., outputs).
    """
    rows = x.numel() // x.shape[-1]
    if not 1 < rows <= few or x.device.type != "cpu" or x.dtype is not torch.float32:
        return F.linear(x, weight, bias)
    found = torch.mm(weight, x.reshape(rows, -1).t()).t().contiguous()
    return (found if bias is None else found.add_(bias)).view(*x.shape[:-1], -1)


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
        return product(input_, linear.weight if weight is None else weight, added), beside

    return forward
