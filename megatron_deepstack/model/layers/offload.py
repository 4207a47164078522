"""Activations on the host between the forward and the backward pass of a layer.

What autograd keeps of the first layers of a chunk goes to the host while the next layer runs, and its memory is free
again from the end of that layer on. It comes back one layer ahead: when the backward pass of a layer begins, what the
layer below it needs is fetched, and where all layers of a chunk are on the host, the lowest one fetches for the highest
one of the next micro-batch. Nothing is remembered from one step to the next, so micro-batches may differ in number and
length. A wrong guess of what is needed next would cost time and nothing else: whoever reads a tensor fetches it.

Kept on the device are parameters, what layers share (angles, rows), what a stage received, and small tensors. Memory is
moved as whole storages: views of the same one are moved once, and are views of the same one again.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from megatron_deepstack.model.layers.computed_again import storage_key
from megatron_deepstack.platform.compute.device import local_device
from megatron_deepstack.platform.compute.host_copies import HostCopy

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Moved:
    """In place of a tensor that autograd keeps: where its bytes are, and how it lies in them."""

    copy: HostCopy
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def read(self) -> Tensor:
        """Return the tensor, fetched if that has not happened yet."""
        storage = self.copy.on_device()
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        with torch.no_grad():
            return empty.set_(storage, self.offset, self.size, self.stride)  # type: ignore[arg-type, call-overload]


@dataclass(slots=True, eq=False)
class LayerPass:
    """What one layer has moved in one micro-batch. Copies live as long as autograd keeps a tensor in them."""

    copies: dict[int, HostCopy] = field(default_factory=dict)
    """By storage; only until the device's memory is given free."""
    fetchable: list[weakref.ref[HostCopy]] = field(default_factory=list)

    def release(self) -> None:
        """Give the memory on the device free."""
        for copy in self.copies.values():
            copy.release()
        self.copies.clear()

    def fetch(self) -> None:
        """Begin to bring everything back that is still wanted; what has not left the device yet stays there."""
        self.copies.clear()
        for reference in self.fetchable:
            copy = reference()
            if copy is not None:
                copy.fetch()
        self.fetchable.clear()


class ChunkOffload:
    """The moved activations of all micro-batches of one chunk."""

    def __init__(self, num_layers: int, offloaded: int, above_bytes: int) -> None:
        """Make one for a chunk; nothing is moved yet.

        Args:
            num_layers: Layers of the chunk.
            offloaded: How many of them, from the first on, are moved.
            above_bytes: Storages of at most so many bytes stay.
        """
        self.num_layers, self.offloaded, self.above_bytes = num_layers, min(offloaded, num_layers), above_bytes
        self.moved_bytes = 0
        """Bytes that went to the host since the start of the process."""
        self._running: LayerPass | None = None
        self._stays: set[int] = set()
        self._waiting: deque[LayerPass] = deque()
        self._micro_batches: deque[list[LayerPass]] = deque()

    def begin(self, layer: int, parameters: Iterable[Tensor], shared: Iterable[Tensor]) -> None:
        """Begin the forward pass of a layer.

        Args:
            layer: Its place in the chunk, from 0.
            parameters: The layer's parameters.
            shared: Tensors that the layer gets and that outlive it, such as angles.
        """
        if layer == 0:
            self._micro_batches.append([])
        self._running = None
        if layer < self.offloaded:
            self._running = LayerPass()
            self._micro_batches[-1].append(self._running)
            self._stays = {storage_key(one) for one in (*parameters, *shared)}

    def move(self, tensor: Tensor) -> Moved | None:
        """Move a tensor to the host.

        Args:
            tensor: One that autograd is about to keep, an ordinary one.

        Returns:
            What is kept in its place, or None if it stays.
        """
        running = self._running
        if running is None or tensor.device != local_device():
            return None
        key, storage = storage_key(tensor), tensor.untyped_storage()
        if key in self._stays or storage.nbytes() <= self.above_bytes:
            return None
        copy = running.copies.get(key)
        if copy is None:
            copy = running.copies[key] = HostCopy(storage)
            running.fetchable.append(weakref.ref(copy))
            self.moved_bytes += copy.nbytes
        return Moved(copy, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def end(self, layer: int, output: Tensor) -> None:
        """End the forward pass of a layer: the layer before it has left the device by now.

        Args:
            layer: Its place in the chunk.
            output: Its hidden states, whose gradient says when its backward pass begins.
        """
        while self._waiting:
            self._waiting.popleft().release()
        if self._running is not None:
            self._waiting.append(self._running)
        self._running, self._stays = None, set()
        if output.requires_grad:
            passes = self._micro_batches[-1]
            output.register_hook(lambda _: self._begin_backward(layer, passes))

    def _begin_backward(self, layer: int, passes: list[LayerPass]) -> None:
        if layer < len(passes):
            passes[layer].fetch()
        while self._waiting:
            self._waiting.popleft().release()
        if layer:
            if layer <= len(passes):
                passes[layer - 1].fetch()
            return
        self._micro_batches = deque(one for one in self._micro_batches if one is not passes)
        following = self._micro_batches[0] if self._micro_batches else []
        if self.offloaded == self.num_layers == len(following):
            following[-1].fetch()
