"""Which samples share a row: as few rows as possible, and rows of nearly equal length. Pure functions of the lengths.

The number of rows matters first, since the step takes as long as its replica with the most rows. So the packer starts
from a lower bound of that number and tries to reach it: it gives each sample, longest first, to the emptiest row, and
exchanges samples until no row is too full. This leaves rows of nearly equal length. Where it fails, best fit decreasing
(which needs at most 11/9 of the smallest number of rows, and a constant) says whether the number is enough, and
otherwise more rows are tried. `tools/bench_balance.py` compares the packer with others.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

_EXCHANGES: Final = 256
"""Exchanges of samples that are tried for one number of rows; each takes about 0.1 ms of 4,096 samples."""
_ATTEMPTS: Final = 8
"""Numbers of rows that are tried below that of best fit decreasing."""

Rows = list[list[int]]


def pack(lengths: Sequence[int], capacity: int, multiple: int = 1) -> Rows:
    """Divide samples into rows.

    Args:
        lengths: Tokens of each sample, at most `capacity`; the caller has refused or cut longer samples.
        capacity: Largest number of tokens of a row.
        multiple: The number of rows is a multiple of this, with empty rows if there are too few samples.

    Returns:
        The indices of the samples of each row, ascending; every sample is in exactly one row.
    """
    assert max(lengths, default=0) <= capacity, f"a sample of {max(lengths)} tokens in rows of {capacity}"
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    fitted = best_fit_decreasing(order, lengths, capacity)
    most = -(-len(fitted) // multiple) * multiple
    fewest = -(-fewest_rows(lengths, capacity) // multiple) * multiple
    step = -(-max(most - fewest, multiple) // (_ATTEMPTS * multiple)) * multiple
    for num_rows in (*range(fewest, most, step), most):
        rows = _even_rows(order, lengths, capacity, num_rows)
        if rows is not None:
            return [sorted(row) for row in rows]
    return [sorted(row) for row in fitted] + [[] for _ in range(most - len(fitted))]


def fewest_rows(lengths: Sequence[int], capacity: int) -> int:
    """Return a lower bound of the number of rows: all tokens fit, and so do the samples that single rows must hold.

    Of samples longer than `capacity / (k + 1)` a row holds at most k. And samples so long that no sample of at least
    some length fits beside them have a row each (the bound L2 of Martello and Toth, 1990).

    Args:
        lengths: Tokens of each sample, at most `capacity`.
        capacity: Largest number of tokens of a row.

    Returns:
        The bound; 0 without samples.
    """
    if not len(lengths):
        return 0
    found = np.sort(np.asarray(lengths, np.int64))[::-1]
    running = np.concatenate([[0], np.cumsum(found)])
    bound = -(-int(running[-1]) // capacity)
    for most in range(1, capacity // max(int(found[-1]), 1) + 1):
        count = int(np.searchsorted(-found, -capacity / (most + 1)))
        bound = max(bound, -(-count // most))
    small = np.unique(found[found <= capacity // 2])
    alone = np.searchsorted(-found, -(capacity - small))  # samples longer than capacity - k
    halves = int(np.searchsorted(-found, -capacity / 2))  # samples longer than half a row
    last = np.searchsorted(-found, -small, side="right")  # samples of at least k
    room = (halves - alone) * capacity - (running[halves] - running[alone])
    more = -(-(running[last] - running[halves] - room) // capacity)
    return max(bound, int((halves + np.maximum(more, 0)).max(initial=halves)))


def best_fit_decreasing(order: Sequence[int], lengths: Sequence[int], capacity: int) -> Rows:
    """Give each sample to the fullest row that has room for it, and open a row if none has.

    Args:
        order: Indices of samples, longest first.
        lengths: Tokens of each sample.
        capacity: Largest number of tokens of a row.

    Returns:
        The indices of the samples of each row.
    """
    rows: Rows = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit k is set if a row has room for exactly k tokens
    for index in order:
        length = lengths[index]
        larger = rooms >> length
        if larger:
            room = (larger & -larger).bit_length() - 1 + length
            row = by_room[room].pop()
            rows[row].append(index)
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            row, room = len(rows), capacity
            rows.append([index])
        by_room.setdefault(room - length, []).append(row)
        rooms |= 1 << (room - length)
    return rows


def _even_rows(order: Sequence[int], lengths: Sequence[int], capacity: int, num_rows: int) -> Rows | None:
    """Fill `num_rows` rows evenly; None if a row stays too full."""
    heap = [(0, row) for row in range(num_rows)]
    rows: Rows = [[] for _ in range(num_rows)]
    for index in order:
        tokens, row = heap[0]
        rows[row].append(index)
        heapq.heapreplace(heap, (tokens + lengths[index], row))
    if max((tokens for tokens, _ in heap), default=0) <= capacity:
        return rows
    return rows if _Exchanges(rows, np.asarray(lengths, np.int64), capacity).done() else None


class _Exchanges:
    """Moves samples out of rows that are too full, or exchanges them for shorter ones."""

    def __init__(self, rows: Rows, lengths: npt.NDArray[np.int64], capacity: int) -> None:
        self.rows, self.lengths, self.capacity = rows, lengths, capacity
        self.row_of = np.zeros(len(lengths), np.int64)
        for number, row in enumerate(rows):
            self.row_of[row] = number
        self.tokens = np.bincount(self.row_of, weights=lengths, minlength=len(rows)).astype(np.int64)

    def done(self) -> bool:
        """Exchange until all rows fit; False if they do not within the number of exchanges allowed."""
        for _ in range(_EXCHANGES):
            row = int(self.tokens.argmax())
            excess = int(self.tokens[row]) - self.capacity
            if excess <= 0:
                return True
            if not self._lighten(row, excess):
                return False
        return bool(self.tokens.max() <= self.capacity)

    def _lighten(self, row: int, excess: int) -> bool:
        """Take `excess` tokens or more out of a row in one exchange, or as many as possible; False if none."""
        room = (self.capacity - self.tokens)[self.row_of]
        best: tuple[int, int, int] | None = None
        for index in sorted(self.rows[row], key=lambda one: (self.lengths[one], one)):
            gain = self.lengths[index] - self.lengths
            possible = (gain > 0) & (gain <= room) & (self.row_of != row)
            enough = np.flatnonzero(possible & (gain >= excess))
            if len(enough):
                other = int(enough[(room[enough] - gain[enough]).argmin()])
                self._exchange(index, other)
                return True
            some = np.flatnonzero(possible)
            if len(some):
                other = int(some[gain[some].argmax()])
                best = max(best or (0, 0, 0), (int(gain[other]), index, other))
        if best is not None:
            self._exchange(best[1], best[2])
        return best is not None

    def _exchange(self, one: int, other: int) -> None:
        for index, to in ((one, int(self.row_of[other])), (other, int(self.row_of[one]))):
            self.rows[int(self.row_of[index])].remove(index)
            self.rows[to].append(index)
            self.tokens[self.row_of[index]] -= self.lengths[index]
            self.tokens[to] += self.lengths[index]
            self.row_of[index] = to
