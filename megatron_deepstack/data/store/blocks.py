"""Views of any size as blocks, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_deepstack.data.store.schema import BLOCK_BYTES, num_blocks


def as_blocks(view: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Write a view as whole blocks; the rest of the last one is zero.

    Args:
        view: uint8, of any shape.
        out: uint8 (at least the number of blocks, BLOCK_BYTES), whose first rows take them; a new array if None.

    Returns:
        uint8 (blocks, BLOCK_BYTES).
    """
    count = num_blocks(view.nbytes)
    blocks = np.empty((count, BLOCK_BYTES), np.uint8) if out is None else out[:count]
    flat = blocks.reshape(-1)
    flat[: view.nbytes] = view.reshape(-1)
    flat[view.nbytes :] = 0
    return blocks


def from_blocks(blocks: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the view that blocks begin with, without a copy.

    Args:
        blocks: uint8 (N, BLOCK_BYTES), contiguous; there may be more blocks than the view has.
        shape: The view's shape.

    Returns:
        uint8 of that shape, which shares the memory of `blocks`.
    """
    return blocks.reshape(-1)[: math.prod(shape)].reshape(shape)
