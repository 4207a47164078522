"""Which views an image has: the grid of its crops, the number of its views, and the order in which they are stored.

A *view* is one square picture for the vision tower. View 0 is the *global view*, the whole image. The *crops* are tiles
of a larger version of the image, in raster order. These are the context views; DeepStack-HD also has 2x2 *high-res
crops* of each of them. Grids are `(gw, gh)`: columns, rows.

Other models look at an image at its own resolution, as one view of any size: a `ViewGrid` counts the patches of such a
view, and `smart_resize` chooses its size. Everything here is arithmetic; `data.images` handles pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from megatron_deepstack.config.choices import GridRule, Variant
from megatron_deepstack.config.traits.variants import ViewLayout
from megatron_deepstack.errors import ConfigError, DataError

Grid = tuple[int, int]
"""Columns and rows of an image's crops."""

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
        case ViewLayout.GLOBAL | ViewLayout.NATIVE:
            return 1
        case ViewLayout.CROPS | ViewLayout.TILES:
            return context
        case ViewLayout.HIGH_RES:
            return context * (1 + HIGH_RES_SIDE**2)


def num_views(variant: Variant, shape: ImageShape) -> int:
    """Return the number of views of an image that a variant uses.

    Args:
        variant: The variant.
        shape: Columns and rows of the image's crops, or the patches of its one view.

    Returns:
        The number of views, including the global view.
    """
    if isinstance(shape, ViewGrid):
        return 1
    grid = (shape.columns, shape.rows) if isinstance(shape, TileGrid) else shape
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
    if layout in (ViewLayout.GLOBAL, ViewLayout.NATIVE):
        return layout_views(layout, (1, 1))
    grids = (FIXED_GRID,) if rule is GridRule.FIXED_2X2 else candidate_grids(num_crops)
    return max(layout_views(layout, grid) for grid in grids)


MAX_ASPECT_RATIO: Final = 200
"""Largest ratio of the longer side of an image to its shorter side that `smart_resize` accepts, as published."""


@dataclass(frozen=True, slots=True)
class ViewGrid:
    """The patches of one view at its own resolution, before patches are merged."""

    frames: int
    """Number of patches in time: 1 for a picture, and for a pair of a video's frames."""
    height: int
    """Number of patches from top to bottom."""
    width: int
    """Number of patches from left to right."""
    moving: bool = False
    """Whether the frames of a patch are different pictures of a video. If not, there is one picture, which stands for
    all of them."""

    @classmethod
    def of_pixels(cls, width: int, height: int, *, patch_size: int, merge_size: int, frames: int = 1) -> ViewGrid:
        """Return the grid of a view of the given size.

        Args:
            width: Width in pixels, a multiple of `patch_size * merge_size`.
            height: Height in pixels, a multiple of the same.
            patch_size: Side of a patch in pixels.
            merge_size: Number of patches that one visual token merges in each direction.
            frames: Number of patches in time.

        Returns:
            The grid.

        Raises:
            DataError: A side is not a positive multiple.
        """
        multiple = patch_size * merge_size
        if width < multiple or height < multiple or width % multiple or height % multiple:
            raise DataError(
                f"a view of {width}x{height} pixels: both sides must be positive multiples of {multiple} (patches of "
                f"{patch_size} pixels, {merge_size}x{merge_size} of them in a token); resize it with `smart_resize`"
            )
        return cls(frames=frames, height=height // patch_size, width=width // patch_size)

    @property
    def num_patches(self) -> int:
        """Number of patches."""
        return self.frames * self.height * self.width

    def num_tokens(self, merge_size: int) -> int:
        """Return the number of visual tokens, each of which merges `merge_size` x `merge_size` patches."""
        return self.frames * (self.height // merge_size) * (self.width // merge_size)

    def num_values(self, patch_size: int, temporal_patch_size: int) -> int:
        """Return the number of values that the view's pixels are stored as: three for each pixel of each picture.

        Args:
            patch_size: Side of a patch in pixels.
            temporal_patch_size: Frames of a patch.
        """
        pictures = self.frames * temporal_patch_size if self.moving else self.frames
        return 3 * pictures * self.height * self.width * patch_size**2

    def pixel_size(self, patch_size: int) -> tuple[int, int]:
        """Return width and height in pixels."""
        return self.width * patch_size, self.height * patch_size


@dataclass(frozen=True, slots=True)
class TileGrid:
    """The tiles of an image that is resized with its aspect ratio kept, padded, and cut."""

    columns: int
    rows: int
    image_width: int
    """Width of the image in pixels before it is resized, which says how much of the mosaic is padding."""
    image_height: int

    def unpadded(self, side: int) -> tuple[range, range]:
        """Return the lines and columns of the mosaic that are not padding, as published.

        Args:
            side: Tokens along one side of a tile.

        Returns:
            Lines and columns, in tokens of the mosaic.
        """
        high, wide = self.rows * side, self.columns * side
        if self.image_width / self.image_height > wide / high:
            margin = (high - int(round(self.image_height * (wide / self.image_width), 7))) // 2
            return range(margin, high - margin), range(wide)
        margin = (wide - int(round(self.image_width * (high / self.image_height), 7))) // 2
        return range(high), range(margin, wide - margin)

    def num_tokens(self, side: int) -> int:
        """Return the positions that the image takes: the whole image, then each line of the mosaic with its newline.

        Args:
            side: Tokens along one side of a tile.
        """
        lines, columns = self.unpadded(side)
        return side * side + len(lines) * (len(columns) + 1)

    def num_used_views(self, side: int) -> int:
        """Return the number of views of which a token is used: the whole image, and tiles that are not all padding.

        Args:
            side: Tokens along one side of a tile.
        """
        across, down = (len({place // side for place in places}) for places in self.unpadded(side))
        return 1 + across * down

    def fitted(self, tile: int) -> tuple[int, int]:
        """Return the size to which the image is resized with its aspect ratio kept, as published.

        Args:
            tile: Side of a tile in pixels.

        Returns:
            Width and height in pixels; one of them is that of the mosaic, and the other is at most as large.
        """
        wide, high = self.columns * tile, self.rows * tile
        scale_wide, scale_high = wide / self.image_width, high / self.image_height
        if scale_wide < scale_high:
            return wide, min(math.ceil(self.image_height * scale_wide), high)
        return min(math.ceil(self.image_width * scale_high), wide), high


def tile_grid(width: int, height: int, tile: int, grids: Sequence[Grid]) -> TileGrid:
    """Choose the tiles of an image: the grid that keeps most of it, as LLaVA-NeXT and Granite publish.

    Args:
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        tile: Side of a tile in pixels.
        grids: Possible grids of tiles.

    Returns:
        The tiles. Of equally good grids the first is taken.

    Raises:
        DataError: The image has no pixels.
        ConfigError: There is no grid to choose from.
    """
    if min(width, height) < 1:
        raise DataError(f"an image of {width}x{height} pixels: it needs at least one pixel in each direction")
    if not grids:
        raise ConfigError(['model.vision.tile_grids is empty; name the grids of tiles, such as ["2x1", "2x2"]'])

    def fit(grid: Grid) -> tuple[int, int]:
        wide, high = grid[0] * tile, grid[1] * tile
        scale = min(wide / width, high / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - wide * high

    columns, rows = max(grids, key=fit)
    return TileGrid(columns=columns, rows=rows, image_width=width, image_height=height)


def read_tile_grids(texts: Sequence[str]) -> tuple[Grid, ...]:
    """Read grids of tiles as a recipe writes them.

    Args:
        texts: `model.vision.tile_grids`, such as "2x1" for two tiles beside each other.

    Returns:
        Columns and rows of each.
    """
    pairs = (text.split("x") for text in texts)
    return tuple((int(columns), int(rows)) for columns, rows in pairs)


ImageShape = Grid | ViewGrid | TileGrid
"""What determines the rows of an image: the grid of its crops, the patches of its one view, or its tiles."""


def stored_shape(layout: ViewLayout, grid: Sequence[int], size: tuple[int, int]) -> ImageShape:
    """Return what determines the rows of an image, from what a store or a processor says of it.

    Args:
        layout: Which views there are.
        grid: Columns and rows of crops or tiles, or the patches of a view of any size in time, height and width.
        size: Width and height of the image in pixels, before it was resized.

    Returns:
        The shape; of a view of any size that of a picture, whose frames are equal.
    """
    if layout is ViewLayout.NATIVE:
        frames, height, width = grid
        return ViewGrid(frames, height, width)
    columns, rows = grid
    return TileGrid(columns, rows, *size) if layout is ViewLayout.TILES else (columns, rows)


def smart_resize(width: int, height: int, *, multiple: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Choose the size of a view from the size of its image, as published for Qwen-VL.

    Sides are rounded to multiples. If the area is then outside the limits, both sides are scaled by the same factor,
    so that the area comes back within them.

    Args:
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        multiple: Pixels of which each side becomes a multiple: side of a patch times the merge size.
        min_pixels: Smallest area of a view in pixels.
        max_pixels: Largest area of a view in pixels. A very long view may exceed it, since no side is below `multiple`.

    Returns:
        Width and height of the view in pixels.

    Raises:
        DataError: The image has no pixels, or one side is more than 200 times the other.
    """
    if min(width, height) < 1:
        raise DataError(f"an image of {width}x{height} pixels: it needs at least one pixel in each direction")
    ratio = max(width, height) / min(width, height)
    if ratio > MAX_ASPECT_RATIO:
        raise DataError(
            f"an image of {width}x{height} pixels: its sides have a ratio of {ratio:.0f}, and at most "
            f"{MAX_ASPECT_RATIO} is possible; crop it or leave it out"
        )
    wide, high = round(width / multiple) * multiple, round(height / multiple) * multiple
    if wide * high > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        wide, high = (max(multiple, math.floor(side / shrink / multiple) * multiple) for side in (width, height))
    elif wide * high < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        wide, high = (math.ceil(side * grow / multiple) * multiple for side in (width, height))
    return wide, high
