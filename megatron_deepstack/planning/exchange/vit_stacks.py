"""DeepStack-V's plan: which stacks enter the ViT before which layer, and which find none."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.config.sizes import used_layers
from megatron_deepstack.errors import SlotError
from megatron_deepstack.planning.views import FIXED_GRID

STACKS_IN_VIT = FIXED_GRID[0] * FIXED_GRID[1]
"""Stacks of an image: its crops, whose grid is the same for all images."""


@dataclass(frozen=True, slots=True)
class VitStackPlan:
    """Where the stacks go in the ViT."""

    slots: tuple[int, ...]
    """0-based ViT layer of each stack that is added."""
    last_unprocessed: bool
    """The last of them is added to the selected feature itself, after which no layer runs."""
    dropped: tuple[int, ...]
    """Stacks whose layer lies after the selected feature: computed by nothing, added nowhere, as published."""


def plan_vit_stacks(model: ModelConfig) -> VitStackPlan:
    """Where the stacks go in the ViT. They run from `stacks.start` on; those beyond the selected feature are reported.

    Args:
        model: A model whose variant adds its stacks in the ViT.

    Returns:
        Layers of the stacks that find one, and the numbers of those that do not.

    Raises:
        SlotError: Not even the first stack has a place, or `stacks.slots` does not name a layer for each.
    """
    vision, stacks = model.vision, model.stacks
    feature = used_layers(vision)
    wanted = stacks.slots or tuple(stacks.start + k * stacks.interval for k in range(STACKS_IN_VIT))
    if len(wanted) != STACKS_IN_VIT:
        raise SlotError(
            [
                f"model.stacks.slots: {len(wanted)} slots {list(wanted)} for DeepStack-V's {STACKS_IN_VIT} stacks; "
                "give one ViT layer per stack"
            ]
        )
    last = min(feature, vision.num_layers - 1)
    slots = tuple(slot for slot in wanted if slot <= last)
    if not slots or min(wanted) < 0 or list(wanted) != sorted(set(wanted)):
        raise SlotError(
            [
                f"model.stacks: ViT layers {list(wanted)} for DeepStack-V's stacks must rise and begin within 0 to "
                f"{last} (the feature is what enters layer {feature} of {vision.num_layers}); lower model.stacks.start"
            ]
        )
    return VitStackPlan(
        slots=slots,
        last_unprocessed=slots[-1] == feature,
        dropped=tuple(range(len(slots), len(wanted))),
    )
