"""From the tokens of crops to stacks: mosaic, sampling, and the layout of any-resolution contexts (paper section 3.2).

Shapes: S patch side of a view, gw and gh columns and rows of the grid, W channels (vision or decoder width).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_deepstack.config.choices import Sampler, Variant
from megatron_deepstack.config.schema import StackConfig

Grid = tuple[int, int]
HIGH_RES_SIDE = 2
"""DeepStack-HD cuts every context view into this many high-resolution crops in each direction."""


def slot_of_stack(stacks: StackConfig, k: int) -> int:
    """The layer before which a stack is added.

    Args:
        stacks: The recipe's section.
        k: The stack, from 0.

    Returns:
        0-based number of the decoder layer to whose input the stack is added.
    """
    return stacks.slots[k] if stacks.slots is not None else stacks.start + k * stacks.interval


def num_views_of_image(variant: Variant, grid: Grid) -> int:
    """Views that an image brings: global view, crops, and for DeepStack-HD the crops of each of those.

    Args:
        variant: The variant; a LLaVA has the global view alone.
        grid: Columns and rows of the image's crops.

    Returns:
        Their number.
    """
    num_context = 1 + grid[0] * grid[1]
    if variant is Variant.LLAVA:
        return 1
    return num_context * (1 + HIGH_RES_SIDE**2) if variant is Variant.DEEPSTACK_HD else num_context


def mosaic(crops: Tensor, grid: Grid) -> Tensor:
    """The feature map of the whole picture, from the crops.

    Args:
        crops: (gh * gw, S * S, W), crops in raster order.
        grid: (gw, gh).

    Returns:
        (gh * S, gw * S, W).
    """
    gw, gh = grid
    side = math.isqrt(crops.shape[1])
    tiles = crops.reshape(gh, gw, side, side, -1)
    return torch.cat([torch.cat(list(tiles[i]), dim=1) for i in range(gh)], dim=0)


def sample_stacks(crops: Tensor, grid: Grid, sampler: Sampler) -> list[Tensor]:
    """The mosaic dealt to stacks; together they hold every token once.

    Args:
        crops: (gh * gw, S * S, W), crops in raster order.
        grid: (gw, gh).
        sampler: How it is dealt.

    Returns:
        gw * gh stacks of (S * S, W).
    """
    gw, gh = grid
    if sampler is Sampler.GRID:
        return list(crops)
    picture = mosaic(crops, grid)
    if sampler is Sampler.SEQUENTIAL_1D:
        return [picture.flatten(0, 1)[k :: gw * gh] for k in range(gw * gh)]
    assert sampler is Sampler.DILATED_2D, f"the oracle does not know the sampler {sampler}"
    return [picture[i::gh, j::gw].flatten(0, 1) for i in range(gh) for j in range(gw)]


def any_resolution_layout(views: Tensor, grid: Grid, newline: Tensor) -> Tensor:
    """The long context of LLaVA-NeXT and DeepStack-HD: the global tokens, then the mosaic of the crops.

    Args:
        views: (1 + gh * gw, S * S, W), the global view first.
        grid: (gw, gh).
        newline: (W,), the learned vector that closes each row of the mosaic.

    Returns:
        (S * S + gh * S * (gw * S + 1), W).
    """
    picture = mosaic(views[1:], grid)
    newlines = newline.expand(picture.shape[0], 1, -1)
    return torch.cat([views[0], torch.cat([picture, newlines], dim=1).flatten(0, 1)])
