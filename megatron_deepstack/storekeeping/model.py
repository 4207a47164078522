"""Which model is assumed to read a store: a recipe's, or the one its views were most likely made for."""

from __future__ import annotations

from typing import Final

from megatron_deepstack.config.choices import GridRule
from megatron_deepstack.config.schema import ModelConfig, StackConfig, VisionConfig
from megatron_deepstack.config.traits.variants import ViewLayout, variant_of_views
from megatron_deepstack.data.images.processor import check_store
from megatron_deepstack.data.store.reader import Store

_PATCH_SIZE: Final = 14
_PATCHES: Final = 24
"""Patches along a side of a tile, as in Granite 4 Vision."""


def model_for(store: Store, asked: ModelConfig | None) -> ModelConfig:
    """The model that is assumed to read a store.

    Without a recipe, it has the variant that the store's layout of views was made for, and CLIP's patches of 14 pixels,
    for tiles Granite's 24 patches on a side, or, if views have any size, the patches that they were made for.

    Args:
        store: The store.
        asked: A recipe's model, or None.

    Returns:
        `asked`, after a check, or the model made up from the store.

    Raises:
        StoreError: The store cannot feed `asked`.
    """
    if asked is not None:
        check_store(store, asked)
        return asked
    made = store.attributes.processor
    if made["layout"] == ViewLayout.NATIVE:
        vision = VisionConfig(patch_size=int(made["patch_size"]), merge_size=int(made["merge_size"]))
        return ModelConfig(variant=variant_of_views(ViewLayout.NATIVE), vision=vision)
    side = int(made["crop_size"])
    if made["layout"] == ViewLayout.TILES:
        patch = max(side // _PATCHES, 1)
        vision = VisionConfig(image_size=side, patch_size=patch, tile_grids=tuple(made["tile_grids"]))
        return ModelConfig(variant=variant_of_views(ViewLayout.TILES), vision=vision)
    return ModelConfig(
        variant=variant_of_views(ViewLayout(made["layout"])),
        vision=VisionConfig(image_size=side, patch_size=min(_PATCH_SIZE, side)),
        stacks=StackConfig(num_crops=int(made["num_crops"]), grid=GridRule(made["grid"])),
    )
