"""Counting the bytes of tensors that are alive at the same time, on any device, for tests of memory.

Operators are watched while the mode is on, in forward and backward; what existed before is not counted unless it is
added. A storage counts once, whatever views it has, and with the size it has at the moment.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Watches operators while it is entered, and knows the most bytes that were alive at once.

    The result is `peak`. Only tensors that the function `counts` chooses are counted.
    """

    def __init__(self, counts: Callable[[torch.Tensor], bool]) -> None:
        """Make a mode that is not entered yet.

        Args:
            counts: Asked about each tensor that an operator returns; True counts it.
        """
        super().__init__()
        self.peak = 0
        self._counts = counts
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was made outside the mode."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._alive[key] = weakref.ref(storage, lambda _: self._alive.pop(key, None))
        self.peak = max(self.peak, self.now)

    @property
    def now(self) -> int:
        """Bytes alive now."""
        storages = [storage() for storage in list(self._alive.values())]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self._counts(tensor):
                self.add(tensor)
        return result
