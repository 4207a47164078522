"""The processor of models with padded tiles, such as Granite 4 Vision: the whole image as one view, then its tiles.

The whole image is stretched to the size of a view. The tiles are cut from a version of the image that keeps its aspect
ratio and is padded with black to a grid of tiles, which is chosen as published. The pixels equal those of the published
processor that uses Pillow; the one that uses torchvision rounds differently, as torch does (`data.resize=torch`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_deepstack.config.choices import Compression, DeepGrey, ImageResize, Orientation
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.config.traits.variants import ViewLayout
from megatron_deepstack.data.images.colours import AS_PUBLISHED, ColourRules
from megatron_deepstack.data.images.pictures import decode_image, stretch
from megatron_deepstack.data.images.processor import ProcessedImage, described_fields
from megatron_deepstack.data.store.schema import PixelsShape
from megatron_deepstack.planning.views import TileGrid, layout_of, layout_views, read_tile_grids, tile_grid


@dataclass(frozen=True, kw_only=True, slots=True)
class TileProcessor:
    """How an image file becomes one view of the whole image, and tiles."""

    layout: ViewLayout
    crop_size: int
    """Side of a view, and of a tile, in pixels."""
    tile_grids: tuple[str, ...]
    """Grids of tiles to choose from, columns x rows, in the order that decides between equals."""
    resize: ImageResize
    max_image_pixels: int
    orientation: Orientation = Orientation.AS_STORED
    deep_grey: DeepGrey = DeepGrey.AS_PUBLISHED
    transparency: str = AS_PUBLISHED

    @classmethod
    def of(cls, recipe: Recipe) -> TileProcessor:
        """The processor that `recipe` asks for."""
        model, data = recipe.model, recipe.data
        return cls(
            layout=layout_of(model.variant),
            crop_size=model.vision.image_size,
            tile_grids=model.vision.tile_grids,
            resize=data.resize,
            max_image_pixels=data.max_image_pixels,
            orientation=data.orientation,
            deep_grey=data.deep_grey,
            transparency=data.transparency.lower(),
        )

    @classmethod
    def described(cls, made: Mapping[str, Any]) -> TileProcessor:
        """The processor that a store records.

        Args:
            made: As `describe` returns it.

        Returns:
            The processor.
        """
        return cls(**described_fields(cls, made))

    @property
    def most_slots(self) -> int:
        """The largest number of slots, here views, that an image can take in a store."""
        return max(layout_views(self.layout, grid) for grid in read_tile_grids(self.tile_grids))

    def pixels(self, num_parts: int, images_per_part: int, compression: Compression) -> PixelsShape:
        """The shape of the pixels of a store.

        Args:
            num_parts: Number of parts, and so of shards.
            images_per_part: Images of a part.
            compression: Codec of the slots.

        Returns:
            The shape; a shard has space for the most slots that each image can take.
        """
        return PixelsShape(num_parts, images_per_part * self.most_slots, self.crop_size, compression)

    def describe(self) -> dict[str, Any]:
        """What a store records of its processor; plain JSON values."""
        plain = {name: value if isinstance(value, int) else str(value) for name, value in asdict(self).items()}
        return {**plain, "tile_grids": list(self.tile_grids)}

    def process(self, data: bytes, out: np.ndarray | None = None) -> ProcessedImage:
        """Make the views of an image file.

        Args:
            data: The file's bytes.
            out: uint8 (at least `most_slots`, S, S, 3), whose first rows take the views; a new array if None.

        Returns:
            The views and what is known of the image.

        Raises:
            QuarantineError: The image cannot be used.
        """
        colours = ColourRules(self.deep_grey, self.transparency)
        image = decode_image(data, self.max_image_pixels, self.orientation, colours)
        height, width = image.pixels.shape[:2]
        tiles = tile_grid(width, height, self.crop_size, read_tile_grids(self.tile_grids))
        views = self._views(image.pixels, tiles, out)
        sha256 = hashlib.sha256(data).hexdigest()
        return ProcessedImage(views, (tiles.columns, tiles.rows), (width, height), image.damage, sha256)

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
