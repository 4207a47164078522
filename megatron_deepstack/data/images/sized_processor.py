"""The processor of models that look at an image at its own resolution: one view, whose size follows from the image's.

The size is the published one (`smart_resize`): multiples of a merged patch, with an area within limits. The pixels are
resized by Pillow's bicubic filter, and equal those of the published processor that uses Pillow. The published processor
that uses torchvision rounds differently, as torch does (`data.resize=torch`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_deepstack.config.choices import Compression, DeepGrey, ImageResize, Orientation
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.config.traits.variants import ViewLayout
from megatron_deepstack.data.images.colours import AS_PUBLISHED, ColourRules
from megatron_deepstack.data.images.pictures import decode_image, stretch
from megatron_deepstack.data.images.processor import ProcessedImage, described_fields
from megatron_deepstack.data.images.source import FramesAt, QuarantineError
from megatron_deepstack.data.images.video import decode_frames
from megatron_deepstack.data.store.blocks import as_blocks
from megatron_deepstack.data.store.schema import BlockSlots, num_blocks
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.views import MAX_ASPECT_RATIO, ViewGrid, layout_of, smart_resize


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedProcessor:
    """How an image file becomes one view at its own resolution."""

    layout: ViewLayout
    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    resize: ImageResize
    max_image_pixels: int
    orientation: Orientation = Orientation.AS_STORED
    deep_grey: DeepGrey = DeepGrey.AS_PUBLISHED
    transparency: str = AS_PUBLISHED
    video_max_pixels: int = 0
    """Most pixels of all frames of a video; 0 if there are no videos."""

    @classmethod
    def of(cls, recipe: Recipe) -> SizedProcessor:
        """The processor that `recipe` asks for."""
        model, data = recipe.model, recipe.data
        return cls(
            layout=layout_of(model.variant),
            patch_size=model.vision.patch_size,
            merge_size=model.vision.merge_size,
            min_pixels=data.min_pixels,
            max_pixels=data.max_pixels,
            resize=data.resize,
            max_image_pixels=data.max_image_pixels,
            orientation=data.orientation,
            deep_grey=data.deep_grey,
            transparency=data.transparency.lower(),
        )

    @classmethod
    def described(cls, made: Mapping[str, Any]) -> SizedProcessor:
        """The processor that a store records.

        Args:
            made: As `describe` returns it; stores of earlier releases lack what did not exist then.

        Returns:
            The processor.
        """
        return cls(**described_fields(cls, made))

    @property
    def most_slots(self) -> int:
        """The largest number of slots, here blocks, that an image can take in a store.

        A very long view may have more pixels than `max_pixels`, since no side is below a merged patch.
        """
        side = self.patch_size * self.merge_size
        longest = side * side * (MAX_ASPECT_RATIO + 1)
        pair = max(self.video_max_pixels, 2 * longest) if self.video_max_pixels else 0
        return num_blocks(3 * max(self.max_pixels, longest, pair))

    def pixels(self, num_parts: int, images_per_part: int, compression: Compression) -> BlockSlots:
        """The shape of the pixels of a store.

        Args:
            num_parts: Number of parts, and so of shards.
            images_per_part: Images of a part.
            compression: Codec of the slots.

        Returns:
            The shape; a shard has space for the most slots that each image can take.
        """
        return BlockSlots(num_parts, images_per_part * self.most_slots, compression)

    def describe(self) -> dict[str, Any]:
        """What a store records of its processor; plain JSON values."""
        values = asdict(self).items()
        return {
            name: value if isinstance(value, int) else str(value)
            for name, value in values
            if name != "video_max_pixels" or value
        }

    def process(self, data: bytes, out: np.ndarray | None = None) -> ProcessedImage:
        """Make the view of an image file.

        Args:
            data: The file's bytes.
            out: uint8 (at least `most_slots`, BLOCK_BYTES), whose first rows take the view; a new array if None.

        Returns:
            The view as blocks, and what is known of the image.

        Raises:
            QuarantineError: The image cannot be used.
        """
        colours = ColourRules(self.deep_grey, self.transparency)
        image = decode_image(data, self.max_image_pixels, self.orientation, colours)
        view, grid = self.view_of(image.pixels)
        height, width = image.pixels.shape[:2]
        sha256 = hashlib.sha256(data).hexdigest()
        thw = (grid.frames, grid.height, grid.width)
        return ProcessedImage(as_blocks(view, out), thw, (width, height), image.damage, sha256)

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
