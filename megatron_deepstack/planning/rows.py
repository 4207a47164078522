"""Which token of which view becomes which row of which stack: the sampling of the paper as index arithmetic.

Nothing here touches features. For an image with grid (gw, gh), `image_rows` lists every row the image contributes:
the stack it belongs to, its cell in the image's stretch of the sequence (the *context*), and the view and token it
comes from. The ViT's outputs are then only ever indexed, which is exact and differentiable.

Legend: P tokens per view side, n = gw * gh crops, mosaic = the crops' tokens laid out as (P gh) x (P gw).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megatron_deepstack.config.choices import Sampler, Variant
from megatron_deepstack.config.schema import ModelConfig, VisionConfig
from megatron_deepstack.planning.views import HIGH_RES_SIDE, Grid

BASE = -1
"""Stack number of the base visual tokens, which take the placeholders' place."""
NEWLINE = -1
"""View number of the learned `image_newline` row."""

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Rows of one image; the four arrays have one entry per row."""

    context_length: int
    """Sequence positions the image takes."""
    stack: Index
    """Stack number, or BASE."""
    cell: Index
    """Position within the image's context, 0-based."""
    view: Index
    """View number within the image, or NEWLINE."""
    token: Index
    """Token within the view, row-major; 0 for the newline."""


def tokens_per_side(vision: VisionConfig) -> int:
    """P: patches along one side of a view."""
    return vision.image_size // vision.patch_size


def tokens_per_view(vision: VisionConfig) -> int:
    """Feature rows the encoder returns for a view; the class token is not among them."""
    return tokens_per_side(vision) ** 2


def image_rows(model: ModelConfig, grid: Grid) -> ImageRows:
    """All rows of an image with this grid under the model's variant and sampler."""
    return _image_rows(model.variant, model.stacks.sampler, tokens_per_side(model.vision), grid)


def context_length(model: ModelConfig, grid: Grid) -> int:
    """Sequence positions an image takes: 576, or 576 + 24 gh (24 gw + 1) for an any-resolution context."""
    return image_rows(model, grid).context_length


@lru_cache(maxsize=256)
def _image_rows(variant: Variant, sampler: Sampler, side: int, grid: Grid) -> ImageRows:
    base = _rows(BASE, np.arange(side * side), 0, np.arange(side * side))
    if variant in (Variant.LLAVA, Variant.DEEPSTACK_V):
        return _collect(side * side, [base])
    if variant is Variant.DEEPSTACK_L:
        return _collect(side * side, [base, *_stacks_of_crops(sampler, side, grid, first_view=1)])
    if variant is Variant.IN_SEQUENCE:
        return _all_in_sequence(base, _stacks_of_crops(sampler, side, grid, first_view=1), side)
    context = _anyres_context(side, grid)
    length = int(context[1].max()) + 1
    if variant is Variant.LLAVA_ANYRES:
        return _collect(length, [context])
    return _collect(length, [context, *_anyres_stacks(sampler, side, grid, context)])


_Rows = tuple[Index, Index, Index, Index]


def _rows(stack: int, cell: Index, view: Index | int, token: Index) -> _Rows:
    full = np.full_like(cell, 0)
    return full + stack, cell, full + view, full + token


def _collect(length: int, parts: Iterable[_Rows]) -> ImageRows:
    stack, cell, view, token = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    for array in (stack, cell, view, token):
        array.setflags(write=False)
    return ImageRows(context_length=length, stack=stack, cell=cell, view=view, token=token)


def sample_mosaic(sampler: Sampler, side: int, grid: Grid) -> tuple[Index, Index]:
    """Crop (raster order) and token of every stack row: two arrays (gw * gh stacks, P * P cells).

    `2d`: stack i gw + j is `mosaic[i::gh, j::gw]`, so a cell receives tokens of its own place in the picture.
    `1d`: stack k is every n-th token of the row-major mosaic, from k. `grid`: stack k is crop k.
    """
    gw, gh = grid
    num, cells = gw * gh, np.arange(side * side)
    stack = np.arange(num)[:, None]
    if sampler is Sampler.GRID:
        return np.broadcast_to(stack, (num, side * side)), np.broadcast_to(cells, (num, side * side))
    if sampler is Sampler.DILATED_2D:
        y = cells // side * gh + stack // gw
        x = cells % side * gw + stack % gw
    else:
        y, x = np.divmod(stack + cells * num, gw * side)
    return y // side * gw + x // side, y % side * side + x % side


def _stacks_of_crops(sampler: Sampler, side: int, grid: Grid, *, first_view: int) -> list[_Rows]:
    crop, token = sample_mosaic(sampler, side, grid)
    cells = np.arange(side * side)
    return [_rows(k, cells, first_view + crop[k], token[k]) for k in range(len(crop))]


def _all_in_sequence(base: _Rows, stacks: list[_Rows], side: int) -> ImageRows:
    """The baseline that lengthens the context: global tokens, then stack after stack."""
    parts = [base]
    for k, (_, cell, view, token) in enumerate(stacks, start=1):
        parts.append(_rows(BASE, cell + k * side * side, view, token))
    return _collect(side * side * len(parts), parts)


def _anyres_context(side: int, grid: Grid) -> _Rows:
    """Global tokens, then the mosaic of the crops row by row, each row closed by the newline (paper, DeepStack-HD)."""
    gw, gh = grid
    y, column = np.divmod(np.arange(gh * side * (gw * side + 1)), gw * side + 1)
    newline = column == gw * side
    x = np.where(newline, 0, column)
    view = np.where(newline, NEWLINE, 1 + y // side * gw + x // side)
    token = np.where(newline, 0, y % side * side + x % side)
    cells = np.arange(side * side)
    return _rows(
        BASE,
        np.arange(side * side + len(y)),
        np.concatenate([np.zeros_like(cells), view]),
        np.concatenate([cells, token]),
    )


def _anyres_stacks(sampler: Sampler, side: int, grid: Grid, context: _Rows) -> list[_Rows]:
    """Each context view has 2x2 crops of its own; stack k lays them out as the context is, newlines included."""
    _, cell, view, token = context
    first_crop = 1 + grid[0] * grid[1]
    crop, source = sample_mosaic(sampler, side, (HIGH_RES_SIDE, HIGH_RES_SIDE))
    newline = view == NEWLINE
    return [
        _rows(
            k,
            cell,
            np.where(newline, NEWLINE, first_crop + len(crop) * view + crop[k][token]),
            np.where(newline, 0, source[k][token]),
        )
        for k in range(len(crop))
    ]
