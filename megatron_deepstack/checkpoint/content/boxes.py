"""A range of a flattened tensor as boxes of it, the form in which distributed checkpoints take irregular parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Elements `start` to `stop - 1` of a row-major tensor of `shape`, in that order, as few boxes.

    There are at most 2d - 1 boxes for d dimensions: the end of a row, whole rows and the beginning of a row. The two
    partial rows are divided in the same way.

    Args:
        shape: Sizes of the tensor's dimensions.
        start: Flat index of the first element.
        stop: Flat index after the last element.

    Yields:
        Boxes that do not overlap, in row-major order.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,) if shape else (), (stop - start,) if shape else ())
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        yield from _within(last, shape, start - last * row, stop - last * row)
        return
    yield from _within(first - 1, shape, start - (first - 1) * row, row if start < first * row else 0)
    if first < last:
        yield Box((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]))
    yield from _within(last, shape, 0, stop - last * row)


def _within(row: int, shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Boxes of a range inside one row."""
    for box in boxes(shape[1:], start, stop):
        yield Box((row, *box.offset), (1, *box.shape))
