"""Samples that are drawn for a folder: text alone, one image, several images of different shapes, a video's frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.planning.batch.sequence import ExpandedSample, expand
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.exchange.routes import PlannedSample
from megatron_deepstack.planning.exchange.rows import context_length
from megatron_deepstack.planning.views import ImageShape, ViewGrid, num_views, read_tile_grids, tile_grid

_TOKENS = ((1, 1), (2, 3), (4, 1), (3, 5), (2, 2))
"""Height and width of drawn views in visual tokens."""


_EIGHTHS = ((9, 7), (20, 11), (8, 25), (7, 19), (31, 13))
"""Width and height of drawn images, in eighths of a tile."""


@dataclass(frozen=True, slots=True)
class DrawnSample:
    """A sample with its pixels, in plain values that travel to ranks."""

    name: str
    tokens: np.ndarray
    """int64 (T0,), with IMAGE_TOKEN_ID once per image."""
    loss_mask: np.ndarray
    """int64 (T0,), 1 where the token is a target."""
    shapes: tuple[ImageShape, ...]
    pixels: tuple[np.ndarray, ...]
    """Per image uint8 (pictures or views, height, width, 3)."""

    def expanded(self, model: ModelConfig) -> ExpandedSample:
        """The sample with a position for each visual token."""
        lengths = [context_length(model, shape) for shape in self.shapes]
        return expand(self.name, self.tokens, self.loss_mask, lengths, seq_length=1 << 30, truncate=False)

    def planned(self, model: ModelConfig) -> PlannedSample:
        """The sample as the planner takes it."""
        return PlannedSample(sequence=self.expanded(model), grids=self.shapes)


def draw_samples(model: ModelConfig, forbidden: Sequence[int], seed: int = 0) -> list[DrawnSample]:
    """Draw the samples of a comparison.

    Args:
        model: The folder's model.
        forbidden: Token ids that mean something to the model and must not occur as text.
        seed: What everything is drawn from.

    Returns:
        Samples with different numbers of images.
    """
    rng = np.random.default_rng(seed)
    ids = np.setdiff1d(np.arange(model.language.vocab_size), np.array(forbidden, np.int64))
    shapes = _shapes(model)
    wanted: list[tuple[str, list[ImageShape]]] = [
        ("one image", [shapes[1]]),
        ("several images of different shapes", [shapes[0], shapes[3], shapes[2]]),
        ("text only", []),
    ]
    if model.variant.traits.is_native and model.vision.temporal_patch_size > 1:
        wanted.append(("video of two frame pairs", [_shape(model, *size, moving=True) for size in (_TOKENS[4],) * 2]))
    return [_draw(name, images, model, ids, rng) for name, images in wanted]


def _shapes(model: ModelConfig) -> list[ImageShape]:
    """Five images of different shapes."""
    if model.variant.traits.is_native:
        return [_shape(model, *size) for size in _TOKENS]
    side = model.vision.image_size
    grids = read_tile_grids(model.vision.tile_grids)
    sizes = [(width * side // 8, height * side // 8) for width, height in _EIGHTHS]
    return [tile_grid(width, height, side, grids) for width, height in sizes]


def _shape(model: ModelConfig, height: int, width: int, *, moving: bool = False) -> ViewGrid:
    merge = model.vision.merge_size
    return ViewGrid(frames=1, height=height * merge, width=width * merge, moving=moving)


def _draw(
    name: str, shapes: Sequence[ImageShape], model: ModelConfig, ids: np.ndarray, rng: np.random.Generator
) -> DrawnSample:
    tokens = [rng.choice(ids, int(rng.integers(2, 5)))]
    for _ in shapes:
        tokens += [np.array([IMAGE_TOKEN_ID]), rng.choice(ids, int(rng.integers(2, 5)))]
    joined = np.concatenate(tokens).astype(np.int64)
    mask = (rng.random(len(joined)) < 0.7) & (joined != IMAGE_TOKEN_ID)
    mask[-1], mask[0] = True, False
    pixels = tuple(rng.integers(0, 256, _pixel_shape(model, shape), dtype=np.uint8) for shape in shapes)
    return DrawnSample(name=name, tokens=joined, loss_mask=mask.astype(np.int64), shapes=tuple(shapes), pixels=pixels)


def _pixel_shape(model: ModelConfig, shape: ImageShape) -> tuple[int, int, int, int]:
    if not isinstance(shape, ViewGrid):
        side = model.vision.image_size
        return num_views(model.variant, shape), side, side, 3
    width, height = shape.pixel_size(model.vision.patch_size)
    pictures = shape.frames * (model.vision.temporal_patch_size if shape.moving else 1)
    return pictures, height, width, 3
