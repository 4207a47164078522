"""What all processors share: a file is decoded, and the picture becomes slots of a store by rules that a store records.

A processor is everything that decides which pixels a store holds for an image, as one value. It is made from the recipe
and written into the store. A kind of processor adds its own rules as fields, and says how many slots an image may take
and how a picture becomes slots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, get_type_hints

import numpy as np

from megatron_deepstack.config.choices import Compression, DeepGrey, ImageResize, Orientation
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.images.colours import AS_PUBLISHED, ColourRules
from megatron_deepstack.data.images.pictures import decode_image
from megatron_deepstack.data.store.schema import BlockSlots, PixelsShape
from megatron_deepstack.planning.views import ViewLayout, layout_of


@dataclass(frozen=True, slots=True)
class ProcessedImage:
    """An image's views and what is known of it."""

    slots: np.ndarray
    """The views as the store holds them: uint8 (views, S, S, 3), or (blocks, BLOCK_BYTES) of one view of any size."""
    grid: tuple[int, ...]
    """Columns and rows of crops, or the patches of a view of any size in time, height and width."""
    size: tuple[int, int]
    damage: str | None
    """What is wrong with the file although it could be decoded, or what its conversion to RGB lost."""
    sha256: str
    """The hash of the file's bytes, in hexadecimal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProcessor:
    """How an image file becomes slots of a store; the base of all kinds."""

    layout: ViewLayout
    resize: ImageResize
    max_image_pixels: int
    orientation: Orientation = Orientation.AS_STORED
    deep_grey: DeepGrey = DeepGrey.AS_PUBLISHED
    transparency: str = AS_PUBLISHED

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The processor that `recipe` asks for."""
        data = recipe.data
        return cls(
            layout=layout_of(recipe.model.variant),
            resize=data.resize,
            max_image_pixels=data.max_image_pixels,
            orientation=data.orientation,
            deep_grey=data.deep_grey,
            transparency=data.transparency.lower(),
            **cls.own_fields(recipe),
        )

    @classmethod
    def described(cls, made: Mapping[str, Any]) -> Self:
        """The processor that a store records.

        Args:
            made: As `describe` returns it. Fields that are missing there take their defaults, since stores of earlier
                releases lack what did not exist then.

        Returns:
            The processor.
        """
        hints = get_type_hints(cls)
        return cls(**{item.name: hints[item.name](made[item.name]) for item in fields(cls) if item.name in made})

    @classmethod
    def own_fields(cls, recipe: Recipe) -> dict[str, Any]:
        """The values of the fields that this kind adds, by name; each kind has its own."""
        raise NotImplementedError

    @property
    def most_slots(self) -> int:
        """The largest number of slots that an image can take in a store; each kind has its own."""
        raise NotImplementedError

    def pixels(self, num_parts: int, images_per_part: int, compression: Compression) -> PixelsShape | BlockSlots:
        """The shape of the pixels of a store.

        Args:
            num_parts: Number of parts, and so of shards.
            images_per_part: Images of a part.
            compression: Codec of the slots.

        Returns:
            The shape; a shard has space for the most slots that each image can take.
        """
        return self._shape(num_parts, images_per_part * self.most_slots, compression)

    def _shape(self, num_parts: int, slots_per_part: int, compression: Compression) -> PixelsShape | BlockSlots:
        """The shape of the pixels of a store; each kind has its own slots."""
        raise NotImplementedError

    def _slots_of(self, pixels: np.ndarray, out: np.ndarray | None) -> tuple[np.ndarray, tuple[int, ...]]:
        """Slots and grid, as `ProcessedImage` has them, of a picture uint8 (height, width, 3); each kind has its way.

        Raises QuarantineError for a picture that cannot be used.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What a store records of its processor; plain JSON values."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def process(self, data: bytes, out: np.ndarray | None = None) -> ProcessedImage:
        """Make the slots of an image file.

        Args:
            data: The file's bytes.
            out: uint8 (at least `most_slots`, and the shape of a slot), whose first rows take the slots; a new array if
                None.

        Returns:
            The slots and what is known of the image.

        Raises:
            QuarantineError: The image cannot be used.
        """
        colours = ColourRules(self.deep_grey, self.transparency)
        image = decode_image(data, self.max_image_pixels, self.orientation, colours)
        slots, grid = self._slots_of(image.pixels, out)
        height, width = image.pixels.shape[:2]
        return ProcessedImage(slots, grid, (width, height), image.damage, hashlib.sha256(data).hexdigest())


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, int) else str(value)
