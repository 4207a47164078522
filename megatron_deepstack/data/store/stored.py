"""What a store knows of a sample and of an image, as values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_deepstack.data.store.schema import ImageStatus
from megatron_deepstack.planning.views import ImageShape


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation as tokens; arrays are read-only views of the mapped file, or copies if the store is at a URL."""

    id: str
    tokens: np.ndarray
    """int32 (T,), one IMAGE_TOKEN_ID per image, in the order of `images`."""
    loss_mask: np.ndarray
    """uint8 (T,), 1 where the token itself is learned."""
    images: tuple[int, ...]
    """Image numbers; the same image may serve many samples."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """Where an image's views are, and facts about the image."""

    start: int
    """Row of `images/pixels` that holds the global view, or the first block of the one view."""
    count: int
    """Number of views, or of blocks; 0 for a quarantined image."""
    grid: ImageShape
    """The grid of its crops, its tiles, or the patches of its one view."""
    size: tuple[int, int]
    """Width and height of the original in pixels."""
    status: ImageStatus
    path: str
    """Path as the records give it."""
