"""DeepStack-V's plan: before which ViT layer each stack is added, which stacks have no layer, and what views pass."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.config.sizes import used_layers
from megatron_deepstack.errors import SlotError
from megatron_deepstack.planning.views import FIXED_GRID

STACKS_IN_VIT = FIXED_GRID[0] * FIXED_GRID[1]
"""Number of stacks of an image: one for each crop, since all images have the same grid."""


@dataclass(frozen=True, slots=True)
class VitStackPlan:
    """Where the stacks are added in the ViT."""

    slots: tuple[int, ...]
    """0-based ViT layer of each stack that is added."""
    last_unprocessed: bool
    """Whether the last of them is added to the selected feature itself, after which no layer runs."""
    dropped: tuple[int, ...]
    """Numbers of stacks whose layer is after the selected feature. They are not used, as published."""


def plan_vit_stacks(model: ModelConfig) -> VitStackPlan:
    """Plan where the stacks are added in the ViT: from layer `stacks.start` on, or at `stacks.slots`.

    Args:
        model: A model whose variant adds its stacks in the ViT.

    Returns:
        The layers of stacks up to the selected feature, and the numbers of the stacks after it.

    Raises:
        SlotError: Even the first stack is after the selected feature, or the layers do not rise, or `stacks.slots` does
            not name one layer for each stack.
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


def view_layers(model: ModelConfig, views: float, units: float) -> float:
    """Count the layers of the tower that views of one size pass, over all views.

    Where stacks enter the tower, only the first view of an image goes on after the first of them.

    Args:
        model: A model whose views have one size.
        views: Number of views.
        units: Number of units, which are images with all their views if stacks enter the tower, and else views.

    Returns:
        The sum over views of the used layers that each passes.
    """
    used = used_layers(model.vision)
    shared = plan_vit_stacks(model).slots[0] if model.variant.traits.stacks_in_vit else used
    return views * shared + units * (used - shared)
