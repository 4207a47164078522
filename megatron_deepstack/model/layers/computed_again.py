"""Results that a layer computes again in the backward pass: whoever reads them keeps how they were made, not them.

Autograd keeps the input of a linear for the linear's backward pass. Where that input is the result of a norm, the norm
makes it again from its own input, which costs next to nothing. Autograd's hooks for saved tensors do it: while a layer
runs, each tensor that is about to be kept is compared with the results that are made again, and such a one is replaced
by a note. The first reader of a note computes the result, and the norm's own backward pass uses the same graph.

Megatron-Core's class for this (`CheckpointWithoutOutput`) asks Transformer Engine whether FP8 is on, also where it is
not installed, from 0.17 on compiles C++ code when it first runs, and computes the first result without gradients,
for which PyTorch may use another kernel. Here both results come from the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

Tensor = torch.Tensor


def storage_key(tensor: Tensor) -> int:
    """Return what two tensors share that are views of the same memory, as long as one of them is alive."""
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True, slots=True)
class Note:
    """In place of a tensor that is made again: by which node of the graph, and how it lies in that node's result."""

    node: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def read(self) -> Tensor:
        """Return the tensor, of the same bits as before."""
        made = _Again.made_by(self.node)
        return made.detach().as_strided(self.size, self.stride, self.offset)


class ComputedAgain:
    """The results of one layer that are made again. They are known while the layer's forward pass is `open`."""

    def __init__(self) -> None:
        """Know none."""
        self._results: dict[int, Tensor] = {}
        self.open = False

    def close(self) -> None:
        """End the forward pass of the layer."""
        self.open = False
        self._results.clear()

    def wrap(self, module: torch.nn.Module) -> None:
        """Let a module's results be made again; it must have one tensor as its argument and as its result.

        Args:
            module: Changed in place. Names and values of its parameters stay as they are.
        """
        module.forward = self._wrapped(module, module.forward)  # type: ignore[method-assign]

    def _wrapped(self, module: torch.nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def again(x: Tensor) -> Tensor:
            parameters = tuple(module.parameters())
            if not self.open or not torch.is_grad_enabled():  # within a larger part that is computed again
                return forward(x)
            result = _Again.apply(forward, x, *parameters)  # type: ignore[no-untyped-call]
            if result.grad_fn is not None:
                self._results[storage_key(result)] = result
            return result  # type: ignore[no-any-return]

        return again

    def note(self, tensor: Tensor) -> Note | None:
        """Say how a tensor is made again.

        Args:
            tensor: One that autograd is about to keep.

        Returns:
            What is kept in its place, or None if it is not one of the results.
        """
        result = self._results.get(storage_key(tensor))
        if result is None or result.dtype != tensor.dtype:
            return None
        return Note(result.grad_fn, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


class _Again(torch.autograd.Function):
    """A module's forward pass of which only the input is kept."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.function, ctx.parameters, ctx.graph = function, parameters, None
        ctx.save_for_backward(x)
        with torch.enable_grad(), saved_tensors_hooks(_same, _same):  # hooks of the layer concern what stays
            return function(x.detach().requires_grad_(ctx.needs_input_grad[1])).detach()

    @staticmethod
    def made_by(ctx: Any) -> Tensor:
        """Return the result, computed by the first who asks."""
        if ctx.graph is None:
            (x,) = ctx.saved_tensors
            x = x.detach().requires_grad_(ctx.needs_input_grad[1])
            with torch.enable_grad():
                ctx.graph = x, ctx.function(x)
        return ctx.graph[1]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        result, (x, _) = _Again.made_by(ctx), ctx.graph
        ctx.graph = None
        needed = ctx.needs_input_grad[1:]
        inputs = [one for one, needs in zip((x, *ctx.parameters), needed, strict=True) if needs]
        found = iter(torch.autograd.grad(result, inputs, grads[0]))
        return (None, *(next(found) if needs else None for needs in needed))


def _same(tensor: Tensor) -> Tensor:
    return tensor
