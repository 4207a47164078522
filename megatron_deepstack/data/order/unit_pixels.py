"""The pixels of the views that a rank encodes: read in one call, or unit by unit where something cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.data.order.mixture import Samples
from megatron_deepstack.errors import StoreError


class UnitPixels:
    """Memory for the views of some units, and the reading of them."""

    def __init__(self, store: Samples, model: ModelConfig, requests: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Reserve the memory.

        Args:
            store: Where the views are.
            model: Determines the size of a view, if all have one.
            requests: For each unit its image and views.
        """
        self._store, self._requests = store, requests
        self._native = model.variant.traits.is_native
        if self._native:
            lengths, shape = [prod(store.view_shape(image)) for image, _ in requests], []
        else:
            size = model.vision.image_size
            lengths, shape = [len(views) for _, views in requests], [size, size, 3]
        self._ends = np.cumsum([0, *lengths]).tolist()
        self.pixels = np.empty((self._ends[-1], *shape), np.uint8)
        """(views, image, image, 3), or, if views have any size, all of them one after another in one dimension."""

    def read(self) -> None:
        """Read all views. Raises StoreError for the first one that cannot be read."""
        self._read(self._requests, self.pixels)

    def read_unit(self, number: int) -> None:
        """Read the views of one unit. Raises StoreError, and sets them to zero, if that fails."""
        here = self.pixels[self._ends[number] : self._ends[number + 1]]
        try:
            self._read(self._requests[number : number + 1], here)
        except StoreError:
            here[:] = 0
            raise

    def _read(self, requests: Sequence[tuple[int, Sequence[int]]], out: np.ndarray) -> None:
        if self._native:
            self._store.read_flat([image for image, _ in requests], out)
        else:
            self._store.read_many(requests, out)
