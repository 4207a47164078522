"""The gated activation in one operator gives the bits of separate ones, and keeps less."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_deepstack.model.layers.gated import GatedSilu
from megatron_deepstack.testing.written_bytes import WrittenBytes

SHAPES = {"a layer's": (7, 2, 24), "one row": (1, 1, 2), "nothing": (0, 3, 8)}


def apart(x: torch.Tensor) -> torch.Tensor:
    gate, other = x.chunk(2, dim=-1)
    return F.silu(gate) * other


def activation() -> GatedSilu:
    return GatedSilu(None)  # type: ignore[arg-type]  # it needs nothing of the config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_bits_are_those_of_separate_operators(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(3)
    found = []
    for function in (apart, activation()):
        random.manual_seed(3)
        x = torch.randn(shape, generator=random).to(dtype).requires_grad_()
        y = function(x)
        y.backward(torch.randn(y.shape, generator=random).to(dtype))
        found.append((y, x.grad))
    for expected, ours in zip(*found, strict=True):
        assert torch.equal(expected, ours)


def test_the_gradient_is_the_numerical_one() -> None:
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(activation(), (x,))


def test_it_writes_less() -> None:
    written = []
    for function in (apart, activation()):
        x = torch.randn(5, 2, 64, requires_grad=True)
        with WrittenBytes() as watched:
            function(x).sum().backward()
        written.append(watched.other_bytes)
    assert written[1] < written[0]
