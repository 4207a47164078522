"""The processor: everything that decides which pixels a store holds for an image, as one value.

It is made from the recipe and written into the store. What the model depends on (sizes, views, token ids) is compared
with the recipe again when a run opens the store; resizing, orientation and template concern only the store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

import numpy as np

from megatron_deepstack.config.choices import Compression, DeepGrey, GridRule, ImageResize, Orientation
from megatron_deepstack.config.schema import ModelConfig, Recipe
from megatron_deepstack.data.images.colours import AS_PUBLISHED, ColourRules
from megatron_deepstack.data.images.pictures import decode_image, make_views
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import PixelsShape
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.errors import StoreError
from megatron_deepstack.planning.views import ViewLayout, layout_of, most_views, pick_grid


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


def described_fields(processor: type, made: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with which a processor is made again from what a store records of it.

    Args:
        processor: Its class, a dataclass.
        made: As its `describe` returns it. Fields that are missing there take their defaults, since stores of earlier
            releases lack what did not exist then.
    """
    hints = get_type_hints(processor)
    return {item.name: hints[item.name](made[item.name]) for item in fields(processor) if item.name in made}


@dataclass(frozen=True, kw_only=True, slots=True)
class Processor:
    """How an image file becomes views."""

    crop_size: int
    layout: ViewLayout
    num_crops: int
    grid: GridRule
    resize: ImageResize
    max_image_pixels: int
    orientation: Orientation = Orientation.AS_STORED
    deep_grey: DeepGrey = DeepGrey.AS_PUBLISHED
    transparency: str = AS_PUBLISHED

    @classmethod
    def of(cls, recipe: Recipe) -> Processor:
        """The processor that `recipe` asks for."""
        model, data = recipe.model, recipe.data
        return cls(
            crop_size=model.vision.image_size,
            layout=layout_of(model.variant),
            num_crops=model.stacks.num_crops,
            grid=model.stacks.grid,
            resize=data.resize,
            max_image_pixels=data.max_image_pixels,
            orientation=data.orientation,
            deep_grey=data.deep_grey,
            transparency=data.transparency.lower(),
        )

    @classmethod
    def described(cls, made: Mapping[str, Any]) -> Processor:
        """The processor that a store records.

        Args:
            made: As `describe` returns it; stores of earlier releases lack what did not exist then.

        Returns:
            The processor.
        """
        return cls(**described_fields(cls, made))

    @property
    def most_slots(self) -> int:
        """The largest number of slots, here views, that an image can take in a store."""
        return most_views(self.layout, self.grid, self.num_crops)

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
        return {name: value if isinstance(value, int) else str(value) for name, value in asdict(self).items()}

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
        if self.layout is ViewLayout.GLOBAL:
            grid = (1, 1)
        else:
            grid = pick_grid(self.grid, width, height, self.crop_size, self.num_crops)
        views = make_views(image.pixels, grid, self.layout, self.crop_size, self.resize, out)
        return ProcessedImage(views, grid, (width, height), image.damage, hashlib.sha256(data).hexdigest())


def check_store(store: Store, model: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
    """Check that a store can feed a model.

    A store may hold more views than the model looks at: one store serves DeepStack-L and its baselines.

    Args:
        store: The open store.
        model: The recipe's model.
        tokenizer: The recipe's tokenizer; None leaves its comparison out.

    Raises:
        StoreError: They do not fit; the message names every difference.
    """
    faults = [*_view_faults(store, model), *_token_faults(store, model, tokenizer)]
    if faults:
        listed = "\n  ".join(faults)
        raise StoreError(
            f"{store.name} was made for something else:\n  {listed}\nChange the recipe, or preprocess again."
        )


def _view_faults(store: Store, model: ModelConfig) -> list[str]:
    made, stacks, layouts = store.attributes.processor, model.stacks, list(ViewLayout)
    needed = layout_of(model.variant)
    if {needed, ViewLayout(made["layout"])} & {ViewLayout.NATIVE, ViewLayout.TILES}:
        return _faults_of_equals(made, needed, model)
    faults = [_fault("model.vision.image_size", model.vision.image_size, made["crop_size"])]
    if layouts.index(ViewLayout(made["layout"])) < layouts.index(needed):
        faults.append(
            f"model.variant {model.variant.value!r} needs the views {needed.value!r}, it holds {made['layout']!r}"
        )
    if needed is not ViewLayout.GLOBAL:
        faults.append(_fault("model.stacks.grid", stacks.grid.value, made["grid"]))
        if stacks.grid is GridRule.BEST_FIT:
            faults.append(_fault("model.stacks.num_crops", stacks.num_crops, made["num_crops"]))
    return [fault for fault in faults if fault]


def _faults_of_equals(made: Mapping[str, Any], needed: ViewLayout, model: ModelConfig) -> list[str]:
    """Differences if the store or the model has views of any size, or padded tiles: both must have the same."""
    if needed != made["layout"]:
        return [f"model.variant {model.variant.value!r} needs the views {needed.value!r}, it holds {made['layout']!r}"]
    if needed is ViewLayout.TILES:
        faults = [_fault("model.vision.image_size", model.vision.image_size, made["crop_size"])]
        asked_grids, made_grids = ", ".join(model.vision.tile_grids), ", ".join(made["tile_grids"])
        faults.append(_fault("model.vision.tile_grids", asked_grids, made_grids))
    else:
        asked = {name: getattr(model.vision, name) for name in ("patch_size", "merge_size")}
        faults = [_fault(f"model.vision.{name}", value, made[name]) for name, value in asked.items()]
    return [fault for fault in faults if fault]


def _token_faults(store: Store, model: ModelConfig, tokenizer: Tokenizer | None) -> list[str]:
    made, vocab_size = store.attributes.tokenizer, model.language.vocab_size
    faults = []
    if made["vocab_size"] > vocab_size:
        faults.append(f"model.language.vocab_size is {vocab_size}, its tokenizer has {made['vocab_size']} ids")
    if tokenizer is not None and made["sha256"] != tokenizer.fingerprint:
        ours = tokenizer.fingerprint
        faults.append(f"{tokenizer.source} has sha256 {ours[:12]}..., its tokenizer had {made['sha256'][:12]}...")
    return faults


def _fault(name: str, asked: int | str, made: int | str) -> str:
    return "" if asked == made else f"{name} is {asked}, it was made with {made}"
