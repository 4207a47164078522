"""The samplers: which token of the mosaic each cell of each stack receives, and what a report says of it.

A sampler is a row of `SAMPLERS`. Its function answers for whole arrays of stacks and cells at once, so it is
arithmetic on indices that broadcasts; every token of the mosaic must be given out exactly once. Rows, the ViT's own
stacks, drawings and the pictures of a store all ask this table.

Legend: P tokens per view side, n = gw * gh crops, mosaic = the crops' tokens laid out as (P gh) x (P gw).
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
Place = Callable[[int, Grid, Index, Index], tuple[Index, Index]]
"""(P, grid, stack numbers (n, 1), cells (P * P,)) to rows and columns of the mosaic, both (n, P * P)."""


@dataclass(frozen=True, slots=True)
class SamplerTraits:
    """What a sampler does."""

    place: Place
    """Where in the mosaic a stack's cell takes its token from."""
    note: str
    """What the stage plan's drawing says below a mosaic of 2x2 crops."""


def _dilated(side: int, grid: Grid, stack: Index, cell: Index) -> tuple[Index, Index]:
    """Stack i gw + j is `mosaic[i::gh, j::gw]`, so a cell receives tokens of its own place in the picture."""
    gw, gh = grid
    return cell // side * gh + stack // gw, cell % side * gw + stack % gw


def _sequential(side: int, grid: Grid, stack: Index, cell: Index) -> tuple[Index, Index]:
    """Stack k is every n-th token of the mosaic read row by row, from k."""
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
"""One row for each sampler; a test looks that none is missing."""


def sample_mosaic(sampler: Sampler, side: int, grid: Grid) -> tuple[Index, Index]:
    """Where every row of every stack comes from.

    Args:
        sampler: How the mosaic is cut into stacks.
        side: P, tokens per side of a view.
        grid: Columns and rows of crops.

    Returns:
        Crop (in raster order) and token (row by row) of each stack's cells: two arrays (gw * gh, P * P).
    """
    gw, gh = grid
    stack, cell = np.arange(gw * gh)[:, None], np.arange(side * side)
    y, x = SAMPLERS[sampler].place(side, grid, stack, cell)
    return y // side * gw + x // side, y % side * side + x % side


def stack_of_token(sampler: Sampler, side: int, grid: Grid) -> Index:
    """The stack that takes each token of the mosaic, (P gh, P gw)."""
    gw, gh = grid
    stack, cell = np.arange(gw * gh)[:, None], np.arange(side * side)
    y, x = SAMPLERS[sampler].place(side, grid, stack, cell)
    taken = np.full((gh * side, gw * side), -1, np.int64)
    taken[y, x] = stack
    return taken
