"""Results that a layer computes again in the backward pass: whoever reads them keeps how they were made, not them.

Autograd keeps the input of a linear for the linear's backward pass. Where that input is the result of a norm, it can be
made again from the norm's own input, which costs next to nothing, and so can all that the norm keeps beside that input.
Autograd's hooks for saved tensors do it: while a layer runs, each tensor that is about to be kept is compared with the
results that are made again, and such a one is replaced by a note. The first who reads a note runs the module once more.
The graph is the same as without, so gradients are added in the same order and have the same bits.

Megatron-Core's class for this (`CheckpointWithoutOutput`) asks Transformer Engine whether FP8 is on, also where it is
not installed, and from 0.17 on compiles C++ code when it first runs. Its node in the graph also adds up the gradients
of a norm of several operators in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

Tensor = torch.Tensor
Keep = Callable[[Tensor], Any]
"""What a layer keeps in place of a tensor: the tensor itself, or something with a method `read`."""


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one, with memory of its own or a view of it."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


def storage_key(tensor: Tensor) -> int:
    """Return what two tensors share that are views of the same memory, as long as one of them is alive."""
    return tensor.untyped_storage()._cdata


def stays(tensor: Tensor) -> Tensor:
    """Return what is kept for a tensor that stays: never one with a node, which may be the node that keeps it."""
    return tensor if tensor.grad_fn is None else tensor.detach()


def read(kept: Any) -> Tensor:
    """Return the tensor that something is kept for."""
    return kept if isinstance(kept, Tensor) else kept.read()


@dataclass(slots=True)
class Making:
    """One call of a module: what it takes to repeat it, and what came of it once it was repeated."""

    forward: Callable[[Tensor], Tensor]
    kept_input: Any
    needs_grad: bool
    parameters: frozenset[int]
    """Their storages, which are kept as they are. (The input's own may be gone, and its place taken by another.)"""
    num_inner: int = 0
    """Tensors that the module keeps beside these."""
    result: Tensor | None = None
    inner: list[Tensor] = field(default_factory=list)

    def run_again(self) -> None:
        """Run the module again, unless that was done."""
        if self.result is not None:
            return
        x = read(self.kept_input).detach().requires_grad_(self.needs_grad)
        own = self.parameters | {storage_key(x)}

        def collect(tensor: Tensor) -> None:
            if is_plain(tensor) and storage_key(tensor) not in own:
                self.inner.append(tensor.detach())

        with torch.enable_grad(), saved_tensors_hooks(collect, _never):
            self.result = self.forward(x).detach()
        assert len(self.inner) == self.num_inner, "the module kept other tensors when it was run again"


@dataclass(frozen=True, slots=True)
class ResultNote:
    """In place of a result, or of a view of it."""

    making: Making
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def read(self) -> Tensor:
        """Return the tensor, of the same bits as before."""
        self.making.run_again()
        assert self.making.result is not None
        return self.making.result.as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True, slots=True)
class InnerNote:
    """In place of a tensor that the module itself keeps."""

    making: Making
    number: int

    def read(self) -> Tensor:
        """Return the tensor, of the same bits as before."""
        self.making.run_again()
        return self.making.inner[self.number]


class ComputedAgain:
    """The results of one layer that are made again. They are known while the layer's forward pass is open."""

    def __init__(self) -> None:
        """Know none."""
        self._results: dict[int, tuple[Tensor, Making]] = {}
        self._keep: Keep | None = None

    def open(self, keep: Keep) -> None:
        """Begin the forward pass of the layer.

        Args:
            keep: Says what is kept of the inputs of modules.
        """
        self._keep = keep

    def close(self) -> None:
        """End the forward pass of the layer."""
        self._keep = None
        self._results.clear()

    def wrap(self, module: torch.nn.Module) -> None:
        """Let a module's results be made again; it must have one tensor as its argument and as its result.

        Args:
            module: Changed in place. Names and values of its parameters stay as they are.
        """
        forward = module.forward

        def once(x: Tensor) -> Tensor:
            if self._keep is None or not torch.is_grad_enabled():  # within a larger part that is computed again
                return forward(x)  # type: ignore[no-any-return]
            parameters = frozenset(map(storage_key, module.parameters()))
            making, own = Making(forward, self._keep(x.detach()), x.requires_grad, parameters), storage_key(x)

            def pack(tensor: Tensor) -> Any:
                if not is_plain(tensor) or storage_key(tensor) in parameters | {own}:
                    return stays(tensor) if self._keep is None else self._keep(tensor)
                making.num_inner += 1
                return InnerNote(making, making.num_inner - 1)

            with saved_tensors_hooks(pack, read):
                result: Tensor = forward(x)
            self._results[storage_key(result)] = result, making
            return result

        module.forward = once  # type: ignore[method-assign]

    def note(self, tensor: Tensor) -> ResultNote | None:
        """Say how a tensor is made again.

        Args:
            tensor: One that autograd is about to keep, an ordinary one.

        Returns:
            What is kept in its place, or None if it is not one of the results.
        """
        result, making = self._results.get(storage_key(tensor), (None, None))
        if result is None or making is None or result.dtype != tensor.dtype:
            return None
        return ResultNote(making, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _never(kept: None) -> Tensor:
    raise AssertionError("the graph of the second run is not used")
