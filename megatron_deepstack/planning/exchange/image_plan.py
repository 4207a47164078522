"""The plan of one image for any layout: the units that encode it, and its rows by the slot that adds them.

Plans of whole images are cached, since a step has many images and few different grids. Nothing here depends on ranks;
`routes` assigns units and rows to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.planning.exchange.rows import BASE, NEWLINE, ImageRows, image_rows, unit_rows
from megatron_deepstack.planning.slots import EMBEDDING, decoder_slots
from megatron_deepstack.planning.views import ImageShape

NEWLINE_ROW = -1
"""Value in `SlotRows.row` for the learned newline, which the rank of the image's first unit sends."""

Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SlotRows:
    """The rows of one image that one slot adds, in the order of `rows.image_rows`; arrays have one entry per row."""

    slot: int
    """Decoder layer, or EMBEDDING."""
    cell: Numbers
    """Position within the image's context, 0-based."""
    unit: Numbers
    """Number of the image's unit that makes the row; 0 for the newline."""
    row: Numbers
    """Number of the row, counted from the first row of the image's first unit, or NEWLINE_ROW."""


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """The units of one image, and where their rows are added."""

    units: tuple[tuple[int, ...], ...]
    """The views that each unit reads, in order."""
    slots: tuple[SlotRows, ...]
    """The rows of each slot, ascending by slot; slots without a row are left out."""


def image_plan(model: ModelConfig, shape: ImageShape, length: int) -> ImagePlan:
    """Plan an image of which `length` context positions are left after truncation.

    Args:
        model: The model. The plan depends on its variant, sampler, stacks and vision tower.
        shape: Columns and rows of the image's crops, or the patches of its one view.
        length: Number of the image's positions in the sequence, 0 or more. A number above the context's means all.

    Returns:
        The plan. Views that no row needs have no unit. Arrays are read-only and shared between calls.
    """
    rows = image_rows(model, shape)
    if length >= rows.context_length:
        return _whole_image(model, shape)
    return _plan(model, shape, rows, rows.cell < length)


@lru_cache(maxsize=256)
def _whole_image(model: ModelConfig, shape: ImageShape) -> ImagePlan:
    rows = image_rows(model, shape)
    return _plan(model, shape, rows, np.ones(len(rows.cell), np.bool_))


def _plan(model: ModelConfig, shape: ImageShape, rows: ImageRows, kept: npt.NDArray[np.bool_]) -> ImagePlan:
    view, token = rows.view[kept], rows.token[kept]
    needed = np.unique(view[view != NEWLINE])
    units = _units(model, shape, needed)
    if not units:
        return ImagePlan(units=(), slots=())
    number = np.zeros(int(needed[-1]) + 2, np.int32)  # the last entry is for the newline, whose view number is -1
    if len(units) > 1:
        number[needed] = np.arange(len(units))
    unit = number[view]
    row = np.where(view == NEWLINE, NEWLINE_ROW, unit * unit_rows(model, shape) + token).astype(np.int32)
    cell, slot = rows.cell[kept].astype(np.int32), np.array([EMBEDDING, *decoder_slots(model)])[rows.stack[kept] - BASE]
    slots = []
    for one in np.unique(slot):
        here = np.flatnonzero(slot == one)
        slots.append(_frozen(SlotRows(slot=int(one), cell=cell[here], unit=unit[here], row=row[here])))
    return ImagePlan(units=units, slots=tuple(slots))


def _frozen(rows: SlotRows) -> SlotRows:
    for array in (rows.cell, rows.unit, rows.row):
        array.setflags(write=False)
    return rows


def _units(model: ModelConfig, shape: ImageShape, needed: npt.NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    """Return one unit for each needed view, or a single unit of all views if stacks are added inside the ViT."""
    if not len(needed):
        return ()
    if model.variant.traits.stacks_in_vit:
        assert isinstance(shape, tuple)
        return (tuple(range(1 + shape[0] * shape[1])),)
    return tuple((int(view),) for view in needed)
