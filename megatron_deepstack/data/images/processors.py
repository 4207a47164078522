"""The processor that a recipe asks for: views of one size, or one view at the image's own resolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.config.traits.variants import ViewLayout
from megatron_deepstack.data.images.processor import Processor
from megatron_deepstack.data.images.sized_processor import SizedProcessor

AnyProcessor = Processor | SizedProcessor
"""Any of the processors. All of them make slots of a store from the bytes of an image."""


def processor_of(recipe: Recipe) -> AnyProcessor:
    """Return the processor that `recipe` asks for."""
    return SizedProcessor.of(recipe) if recipe.model.variant.traits.is_native else Processor.of(recipe)


def described_processor(made: Mapping[str, Any]) -> AnyProcessor:
    """Return the processor that a store records.

    Args:
        made: As `describe` of a processor returns it; stores of earlier releases lack what did not exist then.

    Returns:
        The processor.
    """
    return SizedProcessor.described(made) if made["layout"] == ViewLayout.NATIVE else Processor.described(made)
