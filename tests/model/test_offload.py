"""Activations on the host: what leaves, when it is back, and that nothing stays there."""

from __future__ import annotations

import gc
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron_deepstack.model.layers import offload
from megatron_deepstack.model.layers.offload import ChunkOffload, Moved
from megatron_deepstack.platform.compute.host_copies import HostCopy

WIDTH = 16
Tensor = torch.Tensor


class CountedCopy(HostCopy):
    """A copy that is known, and notes when it goes and comes."""

    alive: ClassVar[weakref.WeakSet[CountedCopy]] = weakref.WeakSet()
    events: ClassVar[list[str]] = []

    def __init__(self, storage: torch.UntypedStorage) -> None:
        super().__init__(storage)
        self.number = len([one for one in self.events if one.startswith("out")])
        self.events.append(f"out {self.number}")
        self.alive.add(self)

    def fetch(self) -> None:
        if self._device is None:
            self.events.append(f"in {self.number}")
        super().fetch()

    @property
    def on_device_bytes(self) -> int:
        return self.nbytes if self._device is not None else 0


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> type[CountedCopy]:
    monkeypatch.setattr(offload, "HostCopy", CountedCopy)
    CountedCopy.events.clear()
    CountedCopy.alive.clear()
    return CountedCopy


class Chunk:
    """Layers that keep one tensor each, with the hooks that a decoder layer has."""

    def __init__(self, num_layers: int, offloaded: int, above_bytes: int = 0) -> None:
        self.moving = ChunkOffload(num_layers, offloaded, above_bytes)
        self.weights = [torch.full((WIDTH, WIDTH), 0.01 * n, requires_grad=True) for n in range(1, num_layers + 1)]

    def forward(self, x: Tensor, notes: list[str] | None = None) -> Tensor:
        for layer, weight in enumerate(self.weights):
            self.moving.begin(layer, [weight], [x] if x.is_leaf else [])
            with saved_tensors_hooks(lambda one: self.moving.move(one) or one, self._read):
                x = (x @ weight).sin()
            self.moving.end(layer, x)
        return x

    @staticmethod
    def _read(kept: Tensor | Moved) -> Tensor:
        return kept.read() if isinstance(kept, Moved) else kept


def inputs(rows: int) -> Tensor:
    return torch.linspace(-1, 1, rows * WIDTH).view(rows, WIDTH).requires_grad_()


@pytest.mark.parametrize("offloaded", [1, 2, 3, 100])
def test_micro_batches_of_any_number_and_length(offloaded: int) -> None:
    """In the order of a warm pipeline: two forward, then one forward and one backward at a time."""
    lengths = [[3, 9, 5], [4], [7, 2, 6, 8, 1]]
    found: list[list[Tensor]] = []
    for number in (0, offloaded):
        chunk, gradients = Chunk(3, number), []
        for step in lengths:
            waiting: list[Any] = []
            for rows in step:
                x = inputs(rows)
                waiting.append((x, chunk.forward(x)))
                if len(waiting) == 3:
                    gradients += _backward(waiting)
            while waiting:
                gradients += _backward(waiting)
        found.append([*gradients, *(weight.grad for weight in chunk.weights if weight.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    gc.collect()
    assert not CountedCopy.alive, "nothing is left on the host"


def _backward(waiting: list[Any]) -> list[Tensor]:
    x, output = waiting.pop(0)
    output.square().sum().backward()
    return [x.grad]


def test_what_is_needed_next_comes_one_layer_ahead() -> None:
    """Of four layers the first two leave; each keeps the input of its product and that of its sine."""
    chunk = Chunk(4, 2)
    output = chunk.forward(inputs(4))
    marks: list[str] = []
    assert sum(one.on_device_bytes for one in CountedCopy.alive) == 0
    assert len(CountedCopy.alive) == 3, "the input of the chunk is a leaf, which stays"
    copies = {one.number: one for one in CountedCopy.alive}
    gradient = torch.ones_like(output)

    def mark(layer: int) -> None:
        marks.append(f"{layer}: {sorted(number for number in copies if copies[number].on_device_bytes)}")

    for layer, weight in enumerate(chunk.weights):
        weight.register_hook(lambda _, layer=layer: mark(layer))
    output.backward(gradient)
    assert marks == ["3: []", "2: [1, 2]", "1: [0, 1, 2]", "0: [0, 1, 2]"]


def test_device_memory_is_free_once_the_next_layer_has_run() -> None:
    chunk = Chunk(3, 3)
    chunk.forward(inputs(4))
    held = {one.number: one.on_device_bytes for one in CountedCopy.alive}
    last = max(held)
    assert held == {number: WIDTH * 4 * 4 * (number >= last - 1) for number in held}, "the last layer has no next one"


def test_a_tensor_that_is_kept_twice_is_copied_once_and_parameters_never() -> None:
    moving = ChunkOffload(1, 1, 0)
    weight, x = torch.ones(4, 4, requires_grad=True), torch.ones(4, 4) * 2
    moving.begin(0, [weight], [])
    first, second = moving.move(x), moving.move(x.t()[1:])
    assert first is not None
    assert second is not None
    assert first.copy is second.copy
    assert moving.moved_bytes == x.nbytes
    assert moving.move(weight) is None
    assert moving.move(weight.detach().t()) is None
    moving.end(0, x)
    first.copy.release()
    assert torch.equal(second.read(), x.t()[1:])
    assert storage(first.read()) == storage(second.read()), "views of one memory are that again"


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_small_tensors_stay() -> None:
    moving = ChunkOffload(1, 1, 64)
    moving.begin(0, [], [])
    assert moving.move(torch.ones(16)) is None
    assert moving.move(torch.ones(17)) is not None


def test_a_micro_batch_whose_gradient_is_not_wanted_leaves_nothing() -> None:
    chunk = Chunk(2, 2)
    output = chunk.forward(inputs(4))
    del output
    chunk.forward(inputs(4)).sum().backward()
    gc.collect()
    assert len(CountedCopy.alive) == 0
