"""Which token of which view becomes which row of which stack: the sampling of the paper as index arithmetic.

This module handles indices and no features. For an image with grid (gw, gh), `image_rows` lists all rows of the image.
For each row it gives the stack, the cell (the position among those that the image takes in the sequence, its
*context*), and the view and token from which the row comes. The outputs of the ViT are then only indexed, which is
exact and differentiable.

Legend: P is the number of tokens along a side of a view, n = gw * gh is the number of crops, and the mosaic is the
tokens of all crops arranged as (P gh) x (P gw).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_deepstack.config.choices import Sampler, Variant
from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.config.sizes import resampled_side, tokens_per_side
from megatron_deepstack.config.sizes import tokens_per_view as tokens_per_view
from megatron_deepstack.config.traits.variants import Context, StackSource
from megatron_deepstack.planning.exchange.samplers import Index, sample_mosaic
from megatron_deepstack.planning.slots import num_decoder_stacks
from megatron_deepstack.planning.views import HIGH_RES_SIDE, Grid, ImageShape, TileGrid, ViewGrid

BASE = -1
"""Stack number of the base visual tokens, which replace the placeholder in the sequence."""
NEWLINE = -1
"""View number of the learned `image_newline` row."""


@dataclass(frozen=True, slots=True)
class ImageRows:
    """The rows of one image; the four arrays have one entry per row."""

    context_length: int
    """Number of positions that the image takes in the sequence."""
    stack: Index
    """Stack number, or BASE."""
    cell: Index
    """Position within the image's context, 0-based."""
    view: Index
    """View number within the image, or NEWLINE."""
    token: Index
    """Row within the rows that the encoder makes of the view; 0 for the newline. Without taps, a view has a row for
    each token, line by line. With K taps, token t has rows from (1 + K) t on: its base row, then one for each stack."""


def image_rows(model: ModelConfig, shape: ImageShape) -> ImageRows:
    """List all rows of an image under the model's variant and sampler.

    Args:
        model: The recipe's model.
        shape: Columns and rows of the image's crops, or the patches of its one view.

    Returns:
        The rows: base tokens first, then stack after stack. The arrays are read-only and shared by all callers.
    """
    if isinstance(shape, ViewGrid):
        assert model.variant.traits.is_native, f"{model.variant} cuts an image into crops, found {shape}"
        return _merged_rows(shape.num_tokens(model.vision.merge_size), len(model.vision.taps))
    if isinstance(shape, TileGrid):
        return _tile_rows(shape, resampled_side(model), len(model.vision.taps))
    assert not model.variant.traits.is_native, f"{model.variant} has views of any size, found the grid {shape}"
    return _image_rows(
        model.variant, model.stacks.sampler, tokens_per_side(model.vision), shape, num_decoder_stacks(model)
    )


def unit_rows(model: ModelConfig, shape: ImageShape) -> int:
    """Return the number of rows that the encoder makes of one unit of an image: a view, or for DeepStack-V all views.

    Args:
        model: The recipe's model.
        shape: Columns and rows of the image's crops, or the patches of its one view.

    Returns:
        The number of rows, without the newline.
    """
    if isinstance(shape, ViewGrid):
        return shape.num_tokens(model.vision.merge_size) * (1 + len(model.vision.taps))
    if isinstance(shape, TileGrid):
        return resampled_side(model) ** 2 * len(model.vision.taps)
    return tokens_per_view(model.vision)


def context_length(model: ModelConfig, shape: ImageShape) -> int:
    """Return the number of positions that an image takes in the sequence.

    With P = 24 that is 576, or 576 + 24 gh (24 gw + 1) if the context also has the mosaic.

    Args:
        model: The recipe's model.
        shape: Columns and rows of the image's crops, or the patches of its one view.

    Returns:
        The number of positions before truncation.
    """
    if isinstance(shape, ViewGrid):
        return shape.num_tokens(model.vision.merge_size)
    if isinstance(shape, TileGrid):
        return shape.num_tokens(resampled_side(model))
    return image_rows(model, shape).context_length


@lru_cache(maxsize=256)
def _tile_rows(shape: TileGrid, side: int, num_taps: int) -> ImageRows:
    """The whole image's tokens, then the mosaic without padding and a newline after each line, for each stack alike.

    A token has a row for each tap, one after another.
    """
    lines, columns = shape.unpadded(side)
    places = (np.array(some, np.int64) for some in (lines, [*columns, NEWLINE]))
    y, x = (one.reshape(-1) for one in np.meshgrid(*places, indexing="ij"))
    newline = x == NEWLINE
    view = np.where(newline, NEWLINE, 1 + y // side * shape.columns + x // side)
    token = np.where(newline, 0, y % side * side + x % side)
    whole = np.arange(side * side)
    view, token = np.concatenate([np.zeros_like(whole), view]), np.concatenate([whole, token])
    cells = np.arange(len(view))
    stacks = [_rows(k, cells, view, np.where(view == NEWLINE, 0, token * num_taps + k)) for k in range(num_taps)]
    return _collect(len(cells), stacks)


@lru_cache(maxsize=256)
def _merged_rows(num_tokens: int, num_taps: int) -> ImageRows:
    """The rows of a view of any size: token t in the context, and its rows in each stack on the same cell."""
    cells, first = np.arange(num_tokens), np.arange(num_tokens) * (1 + num_taps)
    return _collect(num_tokens, [_rows(k, cells, 0, first + 1 + k) for k in range(BASE, num_taps)])


@lru_cache(maxsize=256)
def _image_rows(variant: Variant, sampler: Sampler, side: int, grid: Grid, num_stacks: int) -> ImageRows:
    traits = variant.traits
    context = _CONTEXTS[traits.context](sampler, side, grid)
    length = int(context[1].max()) + 1
    stacks = _STACKS[traits.stack_source](sampler, side, grid, context) if traits.stacks_in_decoder else []
    return _collect(length, [context, *stacks[:num_stacks]])


_Rows = tuple[Index, Index, Index, Index]


def _rows(stack: int, cell: Index, view: Index | int, token: Index) -> _Rows:
    full = np.full_like(cell, 0)
    return full + stack, cell, full + view, full + token


def _collect(length: int, parts: Iterable[_Rows]) -> ImageRows:
    stack, cell, view, token = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    for array in (stack, cell, view, token):
        array.setflags(write=False)
    return ImageRows(context_length=length, stack=stack, cell=cell, view=view, token=token)


def _global_context(sampler: Sampler, side: int, grid: Grid) -> _Rows:
    """The tokens of the global view."""
    cells = np.arange(side * side)
    return _rows(BASE, cells, 0, cells)


def _sequence_context(sampler: Sampler, side: int, grid: Grid) -> _Rows:
    """The global tokens, then the tokens of stack after stack: the baseline with a longer sequence."""
    base = _global_context(sampler, side, grid)
    parts = [base]
    for k, (_, cell, view, token) in enumerate(_crop_stacks(sampler, side, grid, base), start=1):
        parts.append(_rows(BASE, cell + k * side * side, view, token))
    stack, cell, view, token = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return stack, cell, view, token


def _mosaic_context(sampler: Sampler, side: int, grid: Grid) -> _Rows:
    """The global tokens, then the mosaic line by line, with the newline after each line (paper, DeepStack-HD)."""
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


def _crop_stacks(sampler: Sampler, side: int, grid: Grid, context: _Rows) -> list[_Rows]:
    """One stack for each crop, on the cells of the global view, which come first in every context."""
    crop, token = sample_mosaic(sampler, side, grid)
    cells = np.arange(side * side)
    return [_rows(k, cells, 1 + crop[k], token[k]) for k in range(len(crop))]


def _high_res_stacks(sampler: Sampler, side: int, grid: Grid, context: _Rows) -> list[_Rows]:
    """Each context view has its own 2x2 high-res crops; stack k arranges them like the context, with its newlines."""
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


_CONTEXTS: Mapping[Context, Callable[[Sampler, int, Grid], _Rows]] = {
    Context.GLOBAL: _global_context,
    Context.MOSAIC: _mosaic_context,
    Context.SEQUENCE: _sequence_context,
}
_STACKS: Mapping[StackSource, Callable[[Sampler, int, Grid, _Rows], list[_Rows]]] = {
    StackSource.CROPS: _crop_stacks,
    StackSource.HIGH_RES: _high_res_stacks,
}
