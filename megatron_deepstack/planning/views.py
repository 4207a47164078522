"""Which views an image has: the grid of its crops, the number of its views, and the order in which they are stored.

A *view* is one square picture for the vision tower. View 0 is the *global view*, the whole image. The *crops* are tiles
of a larger version of the image, in raster order. These are the context views; DeepStack-HD also has 2x2 *high-res
crops* of each of them. Grids are `(gw, gh)`: columns, rows. Everything here is arithmetic; `data.images` handles
pixels.
"""

from __future__ import annotations

from functools import lru_cache

from megatron_deepstack.config.choices import GridRule, Variant
from megatron_deepstack.config.traits.variants import ViewLayout
from megatron_deepstack.errors import ConfigError

Grid = tuple[int, int]

HIGH_RES_SIDE = 2
"""Number of high-res crops of a context view in each direction, for DeepStack-HD."""


FIXED_GRID: Grid = (2, 2)
"""Grid of every image under the grid rule `fixed_2x2`."""


def layout_of(variant: Variant) -> ViewLayout:
    """Return the layout of the views that a variant uses."""
    return variant.traits.views


@lru_cache(maxsize=64)
def candidate_grids(num_crops: int) -> tuple[Grid, ...]:
    """Return all grids of at most `num_crops` crops except 1x1, in the published order, which decides between equals.

    Raises:
        ConfigError: `num_crops` is below 2, so there are none.
    """
    sides = range(1, num_crops + 1)
    grids = tuple((gw, gh) for gw in sides for gh in sides if 1 < gw * gh <= num_crops)
    if not grids:
        raise ConfigError([f"model.stacks.num_crops is {num_crops}: a grid needs at least 2 crops"])
    return grids


def best_grid(width: int, height: int, crop_size: int, num_crops: int) -> Grid:
    """Pick the grid whose canvas of crops keeps most of an image (LLaVA-NeXT's rule).

    The rule imagines that the image is fitted into the canvas with its aspect ratio kept. The grid with most effective
    pixels wins, then the one with the smallest unused part of the canvas, then the earlier candidate. (Afterwards the
    image is in fact stretched over the whole canvas.)

    Args:
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        crop_size: Side of a crop in pixels.
        num_crops: Largest number of crops of an image.

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
    """Pick the grid of an image.

    Args:
        rule: The grid rule.
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        crop_size: Side of a crop in pixels.
        num_crops: Largest number of crops of an image.

    Returns:
        Columns and rows of crops.

    Raises:
        ConfigError: The rule is `best_fit`, and `num_crops` leaves no grid.
    """
    if rule is GridRule.FIXED_2X2:
        return FIXED_GRID
    return best_grid(width, height, crop_size, num_crops)


def layout_views(layout: ViewLayout, grid: Grid) -> int:
    """Return the number of views of an image.

    Args:
        layout: Which views are stored.
        grid: Columns and rows of the image's crops.

    Returns:
        The number of views, including the global view.
    """
    context = 1 + grid[0] * grid[1]
    match layout:
        case ViewLayout.GLOBAL:
            return 1
        case ViewLayout.CROPS:
            return context
        case ViewLayout.HIGH_RES:
            return context * (1 + HIGH_RES_SIDE**2)


def num_views(variant: Variant, grid: Grid) -> int:
    """Return the number of views of an image that a variant uses.

    Args:
        variant: The variant.
        grid: Columns and rows of the image's crops.

    Returns:
        The number of views, including the global view.
    """
    return layout_views(layout_of(variant), grid)


def most_views(layout: ViewLayout, rule: GridRule, num_crops: int) -> int:
    """Return the largest number of views that an image can have.

    Args:
        layout: Which views are stored.
        rule: The grid rule.
        num_crops: Largest number of crops of an image.

    Returns:
        The number of views, including the global view.

    Raises:
        ConfigError: The rule is `best_fit`, and `num_crops` leaves no grid.
    """
    if layout is ViewLayout.GLOBAL:
        return layout_views(layout, (1, 1))
    grids = (FIXED_GRID,) if rule is GridRule.FIXED_2X2 else candidate_grids(num_crops)
    return max(layout_views(layout, grid) for grid in grids)
