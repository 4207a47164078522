"""Which views an image has: the grid of its crops, how many views that makes, and in which order they are stored.

A *view* is one square picture for the vision tower. View 0 is the *global view*, the whole image; the *crops* cut a
larger resize of the image in raster order; DeepStack-HD has, for each of those context views, 2x2 *high-res crops* on
top. Grids are `(gw, gh)`: columns, rows. Everything here is arithmetic; pixels are handled by `data.images`.
"""

from __future__ import annotations

from functools import lru_cache

from megatron_deepstack.config.choices import GridRule, Variant
from megatron_deepstack.config.traits.variants import ViewLayout
from megatron_deepstack.errors import ConfigError

Grid = tuple[int, int]

HIGH_RES_SIDE = 2
"""DeepStack-HD cuts each context view into this many high-res crops in each direction."""


FIXED_GRID: Grid = (2, 2)
"""Grid of every image under the grid rule `fixed_2x2`."""


def layout_of(variant: Variant) -> ViewLayout:
    """Views that `variant` looks at."""
    return variant.traits.views


@lru_cache(maxsize=64)
def candidate_grids(num_crops: int) -> tuple[Grid, ...]:
    """All grids of at most `num_crops` crops except 1x1, in the published order, which breaks ties.

    Raises:
        ConfigError: There are none.
    """
    sides = range(1, num_crops + 1)
    grids = tuple((gw, gh) for gw in sides for gh in sides if 1 < gw * gh <= num_crops)
    if not grids:
        raise ConfigError([f"model.stacks.num_crops is {num_crops}: a grid needs at least 2 crops"])
    return grids


def best_grid(width: int, height: int, crop_size: int, num_crops: int) -> Grid:
    """Grid whose canvas of crops keeps most of an image (LLaVA-NeXT's rule).

    The image is thought to be fitted into the canvas with its aspect ratio kept: most effective pixels win, then the
    least wasted canvas, then the earlier candidate. (Afterwards the image is stretched over the whole canvas.)

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        crop_size: Side of a crop, in pixels.
        num_crops: Most crops an image may have.

    Returns:
        Columns and rows of crops.

    Raises:
        ConfigError: `num_crops` leaves no grid.
    """

    def fit(grid: Grid) -> tuple[int, int]:
        canvas_width, canvas_height = grid[0] * crop_size, grid[1] * crop_size
        scale = min(canvas_width / width, canvas_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas_width * canvas_height

    return max(candidate_grids(num_crops), key=fit)


def pick_grid(rule: GridRule, width: int, height: int, crop_size: int, num_crops: int) -> Grid:
    """Grid of a `width` x `height` image under `rule`."""
    if rule is GridRule.FIXED_2X2:
        return FIXED_GRID
    return best_grid(width, height, crop_size, num_crops)


def layout_views(layout: ViewLayout, grid: Grid) -> int:
    """Number of views of an image with `grid` in `layout`."""
    context = 1 + grid[0] * grid[1]
    match layout:
        case ViewLayout.GLOBAL:
            return 1
        case ViewLayout.CROPS:
            return context
        case ViewLayout.HIGH_RES:
            return context * (1 + HIGH_RES_SIDE**2)


def num_views(variant: Variant, grid: Grid) -> int:
    """Number of views that `variant` looks at for an image with `grid`."""
    return layout_views(layout_of(variant), grid)


def most_views(layout: ViewLayout, rule: GridRule, num_crops: int) -> int:
    """Most views any image can have."""
    if layout is ViewLayout.GLOBAL:
        return layout_views(layout, (1, 1))
    grids = (FIXED_GRID,) if rule is GridRule.FIXED_2X2 else candidate_grids(num_crops)
    return max(layout_views(layout, grid) for grid in grids)
