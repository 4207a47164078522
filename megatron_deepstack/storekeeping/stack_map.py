"""Which stack each token of each view belongs to, for drawing: from the same plan by which training routes rows."""

from __future__ import annotations

import numpy as np

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.config.sizes import tokens_per_side
from megatron_deepstack.planning.exchange.rows import BASE, NEWLINE, image_rows
from megatron_deepstack.planning.exchange.samplers import sample_mosaic
from megatron_deepstack.planning.exchange.vit_stacks import plan_vit_stacks
from megatron_deepstack.planning.slots import decoder_slots
from megatron_deepstack.planning.views import FIXED_GRID, HIGH_RES_SIDE, Grid, ViewLayout, layout_of

NO_STACK = -1
"""A token that is in no stack: it belongs to the context itself, or is not used."""


def stack_maps(model: ModelConfig, grid: Grid) -> dict[int, np.ndarray]:
    """The stack of each token of each view.

    Args:
        model: The model.
        grid: The image's grid.

    Returns:
        By view, int64 (P, P) with P the tokens along a view's side, NO_STACK for tokens in no stack; views without
        stacks are left out.
    """
    side = tokens_per_side(model.vision)
    if model.variant.stacks_in_vit:
        crop, token = sample_mosaic(model.stacks.sampler, side, FIXED_GRID)
        stack = np.repeat(np.arange(len(crop)), crop.shape[1])
        view, token = 1 + crop.reshape(-1), token.reshape(-1)
    else:
        rows = image_rows(model, grid)
        stacked = (rows.stack != BASE) & (rows.view != NEWLINE)
        stack, view, token = rows.stack[stacked], rows.view[stacked], rows.token[stacked]
    maps = {}
    for number in np.unique(view).tolist():
        here = view == number
        flat = np.full(side * side, NO_STACK, np.int64)
        flat[token[here]] = stack[here]
        maps[number] = flat.reshape(side, side)
    return maps


def slot_names(model: ModelConfig) -> list[str]:
    """For each stack, where it is added, in words."""
    if model.variant.stacks_in_vit:
        plan = plan_vit_stacks(model)
        return [f"ViT layer {slot}" for slot in plan.slots] + ["nowhere"] * len(plan.dropped)
    return [f"layer {slot}" for slot in decoder_slots(model)]


def mosaics(model: ModelConfig, grid: Grid) -> list[tuple[str, np.ndarray]]:
    """The views other than the global one, arranged as they are in the picture.

    Args:
        model: The model.
        grid: The image's grid.

    Returns:
        Captions, and arrays of view numbers (rows, columns): the crops of the grid; for DeepStack-HD also the high-res
        crops of the global view, and those of the grid's crops.
    """
    layout = layout_of(model.variant)
    if layout is ViewLayout.GLOBAL:
        return []
    gw, gh = grid
    crops = 1 + np.arange(gw * gh).reshape(gh, gw)
    found = [(f"{gw} x {gh} crops", crops)]
    if layout is ViewLayout.HIGH_RES:
        first = 1 + gw * gh
        inner = np.arange(HIGH_RES_SIDE**2).reshape(HIGH_RES_SIDE, HIGH_RES_SIDE)
        found.append(("high-res crops of the global view", first + inner))
        fine = first + HIGH_RES_SIDE**2 * crops[:, :, None, None] + inner
        shape = (gh * HIGH_RES_SIDE, gw * HIGH_RES_SIDE)
        found.append(("high-res crops of the crops", fine.transpose(0, 2, 1, 3).reshape(shape)))
    return found
