"""The processor of models with padded tiles, such as Granite 4 Vision: the whole image as one view, then its tiles.

The whole image is stretched to the size of a view. The tiles are cut from a version of the image that keeps its aspect
ratio and is padded with black to a grid of tiles, which is chosen as published. The pixels equal those of the published
processor that uses Pillow; the one that uses torchvision rounds differently, as torch does (`data.resize=torch`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.images.image_processor import ImageProcessor
from megatron_deepstack.data.images.pictures import stretch
from megatron_deepstack.data.store.schema import PixelsShape
from megatron_deepstack.planning.views import TileGrid, layout_views, read_tile_grids, tile_grid


@dataclass(frozen=True, kw_only=True, slots=True)
class TileProcessor(ImageProcessor):
    """How an image file becomes one view of the whole image, and tiles."""

    crop_size: int
    """Side of a view, and of a tile, in pixels."""
    tile_grids: tuple[str, ...]
    """Grids of tiles to choose from, columns x rows, in the order that decides between equals."""

    @classmethod
    def own_fields(cls, recipe: Recipe) -> dict[str, Any]:
        """The size of a tile, and the grids."""
        vision = recipe.model.vision
        return {"crop_size": vision.image_size, "tile_grids": vision.tile_grids}

    @property
    def most_slots(self) -> int:
        """The largest number of slots, here views, that an image can take in a store."""
        return max(layout_views(self.layout, grid) for grid in read_tile_grids(self.tile_grids))

    def _shape(self, num_parts: int, slots_per_part: int, compression: Compression) -> PixelsShape:
        return PixelsShape(num_parts, slots_per_part, self.crop_size, compression)

    def _slots_of(self, pixels: np.ndarray, out: np.ndarray | None) -> tuple[np.ndarray, tuple[int, ...]]:
        """The whole image and its tiles uint8 (1 + tiles, S, S, 3), and columns and rows of tiles."""
        height, width = pixels.shape[:2]
        tiles = tile_grid(width, height, self.crop_size, read_tile_grids(self.tile_grids))
        return self._views(pixels, tiles, out), (tiles.columns, tiles.rows)

    def _views(self, pixels: np.ndarray, tiles: TileGrid, out: np.ndarray | None) -> np.ndarray:
        """The whole image, then the tiles in raster order: uint8 (1 + tiles, S, S, 3)."""
        side, (columns, rows) = self.crop_size, (tiles.columns, tiles.rows)
        count = layout_views(self.layout, (columns, rows))
        views = np.empty((count, side, side, 3), np.uint8) if out is None else out[:count]
        views[0] = stretch(pixels, side, side, self.resize)
        mosaic = np.zeros((rows * side, columns * side, 3), np.uint8)
        wide, high = tiles.fitted(side)
        left, top = (columns * side - wide) // 2, (rows * side - high) // 2
        mosaic[top : top + high, left : left + wide] = stretch(pixels, wide, high, self.resize)
        views[1:].reshape(rows, columns, side, side, 3)[...] = mosaic.reshape(rows, side, columns, side, 3).transpose(
            0, 2, 1, 3, 4
        )
        return views
