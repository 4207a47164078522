"""The samplers: which token of the mosaic each cell of each stack receives, and how a report describes that.

A sampler is an entry of `SAMPLERS`. Its function is arithmetic on indices for whole arrays of stacks and cells, and
must assign every token of the mosaic exactly once. The rows of the decoder, the stacks in the ViT, the drawings of
plans and the pictures of stores all use this table.

Legend: P is the number of tokens along a side of a view, n = gw * gh is the number of crops, and the mosaic is the
tokens of all crops arranged as (P gh) x (P gw).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from megatron_deepstack.config.choices import Sampler
from megatron_deepstack.planning.views import Grid

Index = npt.NDArray[np.int64]
MosaicLookup = Callable[[int, Grid, Index, Index], tuple[Index, Index]]
"""Function of P, the grid, stack numbers (n, 1) and cells (P * P,). It returns lines and columns of the mosaic, both
(n, P * P)."""


@dataclass(frozen=True, slots=True)
class SamplerTraits:
    """What a sampler does."""

    lookup: MosaicLookup
    """Function that gives the line and the column of the mosaic from which a cell of a stack takes its token."""
    note: str
    """Text below a mosaic of 2x2 crops in the drawing of the stage plan."""


def _dilated(side: int, grid: Grid, stack: Index, cell: Index) -> tuple[Index, Index]:
    """Stack i gw + j is `mosaic[i::gh, j::gw]`, so the tokens of a cell come from one place in the image."""
    gw, gh = grid
    return cell // side * gh + stack // gw, cell % side * gw + stack % gw


def _sequential(side: int, grid: Grid, stack: Index, cell: Index) -> tuple[Index, Index]:
    """Stack k is every n-th token of the mosaic, counted line by line from token k."""
    gw, gh = grid
    y, x = np.divmod(stack + cell * (gw * gh), gw * side)
    return y, x


def _by_crop(side: int, grid: Grid, stack: Index, cell: Index) -> tuple[Index, Index]:
    """Stack k is crop k."""
    return stack // grid[0] * side + cell // side, stack % grid[0] * side + cell % side


SAMPLERS: Final[Mapping[Sampler, SamplerTraits]] = {
    Sampler.DILATED_2D: SamplerTraits(_dilated, "every 2nd token"),
    Sampler.SEQUENTIAL_1D: SamplerTraits(_sequential, "every 4th token"),
    Sampler.GRID: SamplerTraits(_by_crop, "by crop"),
}
"""The traits of each sampler; a test makes sure that none is missing."""


def sample_mosaic(sampler: Sampler, side: int, grid: Grid) -> tuple[Index, Index]:
    """Find the crop and the token of each cell of each stack.

    Args:
        sampler: How the mosaic is divided into stacks.
        side: P, the number of tokens along a side of a view.
        grid: Columns and rows of crops.

    Returns:
        Number of the crop (in raster order) and of the token in it (line by line): two int64 arrays (gw * gh, P * P).
    """
    gw, gh = grid
    stack, cell = np.arange(gw * gh)[:, None], np.arange(side * side)
    y, x = SAMPLERS[sampler].lookup(side, grid, stack, cell)
    return y // side * gw + x // side, y % side * side + x % side


def stack_of_token(sampler: Sampler, side: int, grid: Grid) -> Index:
    """Find the stack that takes each token of the mosaic.

    Args:
        sampler: How the mosaic is divided into stacks.
        side: P, the number of tokens along a side of a view.
        grid: Columns and rows of crops.

    Returns:
        int64 (P gh, P gw), the number of the stack.
    """
    gw, gh = grid
    stack, cell = np.arange(gw * gh)[:, None], np.arange(side * side)
    y, x = SAMPLERS[sampler].lookup(side, grid, stack, cell)
    taken = np.full((gh * side, gw * side), -1, np.int64)
    taken[y, x] = stack
    return taken
