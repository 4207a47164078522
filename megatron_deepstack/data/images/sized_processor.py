"""The processor of models that look at an image at its own resolution: one view, whose size follows from the image's.

The size is the published one (`smart_resize`): multiples of a merged patch, with an area within limits. The pixels are
resized by Pillow's bicubic filter, and equal those of the published processor that uses Pillow. The published processor
that uses torchvision rounds differently, as torch does (`data.resize=torch`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.images.colours import ColourRules
from megatron_deepstack.data.images.image_processor import ImageProcessor, ProcessedImage
from megatron_deepstack.data.images.pictures import decode_image, stretch
from megatron_deepstack.data.images.source import FramesAt, QuarantineError
from megatron_deepstack.data.images.video import decode_frames
from megatron_deepstack.data.store.blocks import as_blocks
from megatron_deepstack.data.store.schema import BlockSlots, num_blocks
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.views import MAX_ASPECT_RATIO, ViewGrid, smart_resize


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedProcessor(ImageProcessor):
    """How an image file becomes one view at its own resolution."""

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    video_max_pixels: int = 0
    """Most pixels of all frames of a video; 0 if there are no videos."""

    @classmethod
    def own_fields(cls, recipe: Recipe) -> dict[str, Any]:
        """The size of patches, and the limits of a view's area."""
        vision, data = recipe.model.vision, recipe.data
        return {
            "patch_size": vision.patch_size,
            "merge_size": vision.merge_size,
            "min_pixels": data.min_pixels,
            "max_pixels": data.max_pixels,
        }

    @property
    def most_slots(self) -> int:
        """The largest number of slots, here blocks, that an image can take in a store.

        A very long view may have more pixels than `max_pixels`, since no side is below a merged patch.
        """
        side = self.patch_size * self.merge_size
        longest = side * side * (MAX_ASPECT_RATIO + 1)
        pair = max(self.video_max_pixels, 2 * longest) if self.video_max_pixels else 0
        return num_blocks(3 * max(self.max_pixels, longest, pair))

    def _shape(self, num_parts: int, slots_per_part: int, compression: Compression) -> BlockSlots:
        return BlockSlots(num_parts, slots_per_part, compression)

    def describe(self) -> dict[str, Any]:
        """As all processors; a limit for videos is recorded only where there is one."""
        made = ImageProcessor.describe(self)
        return {name: value for name, value in made.items() if name != "video_max_pixels" or value}

    def _slots_of(self, pixels: np.ndarray, out: np.ndarray | None) -> tuple[np.ndarray, tuple[int, ...]]:
        """The view as blocks (blocks, BLOCK_BYTES), and its patches in time, height and width."""
        view, grid = self.view_of(pixels)
        return as_blocks(view, out), (grid.frames, grid.height, grid.width)

    def process_pair(self, contents: Sequence[bytes], at: FramesAt, out: np.ndarray | None = None) -> ProcessedImage:
        """Make the view of a pair of a video's frames.

        Args:
            contents: The bytes of the video file, or of two image files.
            at: Which frames are taken, and the size of the view.
            out: uint8 (at least `most_slots`, BLOCK_BYTES), whose first rows take the view; a new array if None.

        Returns:
            The view as blocks, and what is known of the frames.

        Raises:
            QuarantineError: A frame is missing or damaged.
        """
        if at.numbers is None:
            colours = ColourRules(self.deep_grey, self.transparency)
            limits = self.max_image_pixels, self.orientation, colours
            frames = [decode_image(data, *limits).pixels for data in contents]
        else:
            frames = decode_frames(contents[0], at.numbers)
        width, height = at.size
        view = np.stack([stretch(frame, width, height, self.resize) for frame in frames])
        grid = ViewGrid.of_pixels(width, height, patch_size=self.patch_size, merge_size=self.merge_size)
        name = hashlib.sha256(repr((at.numbers, at.size)).encode())
        for data in contents:
            name.update(hashlib.sha256(data).digest())
        size = frames[0].shape[1], frames[0].shape[0]
        return ProcessedImage(as_blocks(view, out), (1, grid.height, grid.width), size, None, name.hexdigest())

    def view_of(self, pixels: np.ndarray) -> tuple[np.ndarray, ViewGrid]:
        """Resize a picture to its view.

        Args:
            pixels: uint8 (height, width, 3).

        Returns:
            uint8 (new height, new width, 3), and the view's patches.

        Raises:
            QuarantineError: One side is more than 200 times the other.
        """
        height, width = pixels.shape[:2]
        multiple = self.patch_size * self.merge_size
        try:
            wide, high = smart_resize(
                width, height, multiple=multiple, min_pixels=self.min_pixels, max_pixels=self.max_pixels
            )
        except DataError as error:
            raise QuarantineError(str(error)) from error
        grid = ViewGrid.of_pixels(wide, high, patch_size=self.patch_size, merge_size=self.merge_size)
        return stretch(pixels, wide, high, self.resize), grid
