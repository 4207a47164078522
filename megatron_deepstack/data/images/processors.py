"""The processor that a recipe asks for: crops, padded tiles, or one view at the image's own resolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.config.traits.variants import ViewLayout
from megatron_deepstack.data.images.processor import Processor
from megatron_deepstack.data.images.sized_processor import SizedProcessor
from megatron_deepstack.data.images.tile_processor import TileProcessor

AnyProcessor = Processor | SizedProcessor | TileProcessor
"""Any of the processors. All of them make slots of a store from the bytes of an image."""


def processor_of(recipe: Recipe) -> AnyProcessor:
    """Return the processor that `recipe` asks for."""
    return _class_of(recipe.model.variant.traits.views).of(recipe)


def described_processor(made: Mapping[str, Any]) -> AnyProcessor:
    """Return the processor that a store records.

    Args:
        made: As `describe` of a processor returns it; stores of earlier releases lack what did not exist then.

    Returns:
        The processor.
    """
    return _class_of(ViewLayout(made["layout"])).described(made)


def _class_of(layout: ViewLayout) -> type[Processor] | type[SizedProcessor] | type[TileProcessor]:
    match layout:
        case ViewLayout.NATIVE:
            return SizedProcessor
        case ViewLayout.TILES:
            return TileProcessor
        case _:
            return Processor
