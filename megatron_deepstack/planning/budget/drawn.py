"""Samples of a step drawn from what the recipe states, for estimates where there is no store.

Text and images are drawn from `data.expected_text_tokens`, `data.expected_images` and, where an image is looked at in
its own resolution, from `data.expected_image_pixels` and the limits of a view. The same recipe always gives the same
samples. Lengths are as uneven as those of LLaVA's instructions, and areas and shapes of images are about as uneven as
those of photos from the web.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_deepstack.config.choices import GridRule
from megatron_deepstack.config.schema import ModelConfig, Recipe
from megatron_deepstack.config.sizes import resampled_side
from megatron_deepstack.config.traits.variants import ViewLayout
from megatron_deepstack.planning.budget.load import Numbers, Shapes, Views
from megatron_deepstack.planning.exchange.image_plan import image_plan
from megatron_deepstack.planning.exchange.rows import context_length
from megatron_deepstack.planning.views import (
    FIXED_GRID,
    ViewGrid,
    candidate_grids,
    read_tile_grids,
    smart_resize,
    tile_grid,
)

_TEXT_SPREAD = 0.75
_AREA_SPREAD = 0.6
_SHAPE_SPREAD = 0.35
"""Standard deviations of the logarithms of the tokens of a text, of the area of an image, and of its width over its
height."""


def drawn_shapes(recipe: Recipe) -> Shapes:
    """Draw the samples of one step as the recipe states them; always the same for the same recipe.

    Args:
        recipe: Gives the means, the model, and the size of a batch.

    Returns:
        The sizes.
    """
    data, train, model = recipe.data, recipe.train, recipe.model
    random, count = np.random.default_rng(0), train.global_batch_size
    text = _around(random, data.expected_text_tokens, _TEXT_SPREAD, count).astype(np.int64) + 1
    whole, part = divmod(data.expected_images, 1.0)
    images = int(whole) + (random.random(count) < part)
    owner = np.repeat(np.arange(count), images)
    stated = f"{data.expected_images:g} image(s) and {data.expected_text_tokens} text tokens a sample, all targets"
    views = None
    if model.variant.traits.views in (ViewLayout.NATIVE, ViewLayout.TILES):
        sizes = _sizes(random, data.expected_image_pixels, len(owner))
        stated = f"{stated}, images of {data.expected_image_pixels:,} pixels on average"
        if model.variant.traits.is_native:
            views, visual = _views(recipe, sizes, owner)
            units = visual
        else:
            visual, units = _tiles(model, sizes)
    else:
        grids = (FIXED_GRID,) if model.stacks.grid is GridRule.FIXED_2X2 else candidate_grids(model.stacks.num_crops)
        chosen = random.integers(0, len(grids), len(owner))
        visual = np.array([context_length(model, grid) for grid in grids])[chosen]
        units = np.array([len(image_plan(model, grid, context_length(model, grid)).units) for grid in grids])[chosen]
    context = np.bincount(owner, visual, count).astype(np.int64)
    lengths = text + context
    return Shapes(
        lengths=np.minimum(lengths, train.seq_length),
        units=np.bincount(owner, units, count).astype(np.int64),
        visual=np.minimum(context, train.seq_length),
        source=f"drawn, with {stated}",
        views=views,
        targets=np.minimum(text, train.seq_length),
    )


def _around(random: np.random.Generator, mean: float, spread: float, count: int) -> np.ndarray:
    """Draw positive numbers with this mean, whose logarithms are normal."""
    return np.exp(random.normal(np.log(mean) - spread**2 / 2, spread, count))


def _sizes(random: np.random.Generator, mean: int, count: int) -> list[tuple[int, int]]:
    """Draw widths and heights of images in pixels."""
    areas = _around(random, mean, _AREA_SPREAD, count)
    shapes = np.exp(random.normal(0.0, _SHAPE_SPREAD, count))
    sides = np.maximum(np.stack([np.sqrt(areas * shapes), np.sqrt(areas / shapes)], axis=1), 1).astype(np.int64)
    return [(int(width), int(height)) for width, height in sides]


def _views(recipe: Recipe, sizes: Sequence[tuple[int, int]], owner: Numbers) -> tuple[Views, Numbers]:
    """Return the views of images that are looked at in their own resolution, and the visual tokens of each."""
    data, vision = recipe.data, recipe.model.vision
    grids = [
        ViewGrid.of_pixels(
            *smart_resize(
                *size,
                multiple=vision.patch_size * vision.merge_size,
                min_pixels=data.min_pixels,
                max_pixels=data.max_pixels,
            ),
            patch_size=vision.patch_size,
            merge_size=vision.merge_size,
        )
        for size in sizes
    ]
    height, width = (np.array([getattr(grid, side) for grid in grids], np.int64) for side in ("height", "width"))
    return Views(owner, np.ones_like(height), height, width), height * width // vision.merge_size**2


def _tiles(model: ModelConfig, sizes: Sequence[tuple[int, int]]) -> tuple[Numbers, Numbers]:
    """Return the visual tokens of images that are cut into padded tiles, and how many of their views are encoded."""
    grids, side = read_tile_grids(model.vision.tile_grids), resampled_side(model)
    shapes = [tile_grid(*size, model.vision.image_size, grids) for size in sizes]
    tokens = [shape.num_tokens(side) for shape in shapes]
    return np.array(tokens, np.int64), np.array([shape.num_used_views(side) for shape in shapes], np.int64)
