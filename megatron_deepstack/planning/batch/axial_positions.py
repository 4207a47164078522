"""Positions of a sample on three axes (time, height, width), for decoders that rotate by all three (M-RoPE).

A token of text has the same number on all axes. The tokens of an image have the number of the image's first position
on the axis of time (plus the number of their frame), and that number plus their line and column on the others. The text
after an image continues one past the largest number of the image, and not after as many numbers as it has tokens.
Positions begin at 0 with each sample of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron_deepstack.planning.batch.sequence import ExpandedSample, Span
from megatron_deepstack.planning.views import ViewGrid

Positions = npt.NDArray[np.int64]


def grid_positions(grid: ViewGrid, merge_size: int) -> Positions:
    """Return the positions of an image's tokens relative to its first one.

    Args:
        grid: The image's patches.
        merge_size: Number of patches that a token merges in each direction.

    Returns:
        int64 (3, tokens): frame, line and column of each token, frame by frame and line by line.
    """
    shape = grid.frames, grid.height // merge_size, grid.width // merge_size
    return np.indices(shape, np.int64).reshape(3, -1)


def axial_positions(sequence: ExpandedSample, grids: Sequence[ViewGrid], merge_size: int) -> Positions:
    """Return the positions of a sample, or of all samples of a pack.

    Args:
        sequence: The expanded sample or pack.
        grids: The patches of each image, in the order of `Span.image`.
        merge_size: Number of patches that a token merges in each direction.

    Returns:
        int64 (3, T). Of a truncated image the positions that are left.
    """
    spans = [span for span in sequence.spans if span.length]
    parts = [
        _sample_positions(begin, end, [span for span in spans if begin <= span.start < end], grids, merge_size)
        for begin, end in pairwise((0, *sequence.ends))
    ]
    return np.concatenate(parts, axis=1)


def _sample_positions(
    begin: int, end: int, spans: Sequence[Span], grids: Sequence[ViewGrid], merge_size: int
) -> Positions:
    """Return the positions of one sample, (3, end - begin)."""
    parts, here, following = [], begin, 0
    for span in spans:
        parts.append(_text(span.start - here) + following)
        following += span.start - here
        grid = grids[span.image]
        parts.append(grid_positions(grid, merge_size)[:, : span.length] + following)
        here = span.start + span.length
        following += max(grid.height, grid.width) // merge_size
    parts.append(_text(end - here) + following)
    return np.concatenate(parts, axis=1)


def _text(length: int) -> Positions:
    return np.broadcast_to(np.arange(length), (3, length))
