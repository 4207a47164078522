"""The processor of models that look at a global view and crops of it; and whether a store can feed a model.

What the model depends on (sizes, views, token ids) is compared with the recipe again when a run opens the store;
resizing, orientation and template concern only the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_deepstack.config.choices import Compression, GridRule
from megatron_deepstack.config.schema import ModelConfig, Recipe
from megatron_deepstack.data.images.image_processor import ImageProcessor
from megatron_deepstack.data.images.pictures import make_views
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import PixelsShape
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.errors import StoreError
from megatron_deepstack.planning.views import ViewLayout, layout_of, most_views, pick_grid


@dataclass(frozen=True, kw_only=True, slots=True)
class Processor(ImageProcessor):
    """How an image file becomes a global view and crops."""

    crop_size: int
    num_crops: int
    grid: GridRule

    @classmethod
    def own_fields(cls, recipe: Recipe) -> dict[str, Any]:
        """The size of a view, and how an image is cut."""
        stacks = recipe.model.stacks
        return {"crop_size": recipe.model.vision.image_size, "num_crops": stacks.num_crops, "grid": stacks.grid}

    @property
    def most_slots(self) -> int:
        """The largest number of slots, here views, that an image can take in a store."""
        return most_views(self.layout, self.grid, self.num_crops)

    def _shape(self, num_parts: int, slots_per_part: int, compression: Compression) -> PixelsShape:
        return PixelsShape(num_parts, slots_per_part, self.crop_size, compression)

    def _slots_of(self, pixels: np.ndarray, out: np.ndarray | None) -> tuple[np.ndarray, tuple[int, ...]]:
        """The views uint8 (views, S, S, 3), and columns and rows of crops."""
        height, width = pixels.shape[:2]
        if self.layout is ViewLayout.GLOBAL:
            grid = (1, 1)
        else:
            grid = pick_grid(self.grid, width, height, self.crop_size, self.num_crops)
        return make_views(pixels, grid, self.layout, self.crop_size, self.resize, out), grid


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
