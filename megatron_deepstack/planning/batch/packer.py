"""Which samples share a row: as few rows as possible, and rows of nearly equal length. Pure functions of the lengths.

The number of rows matters first, since the step takes as long as its replica with the most rows. So the packer starts
from a lower bound of that number and tries to reach it: it gives each sample, longest first, to the emptiest row, and
exchanges samples until no row is too full. This leaves rows of nearly equal length. Where it fails, best fit decreasing
(which needs at most 11/9 of the smallest number of rows, and a constant) says whether the number is enough, and
otherwise more rows are tried. `tools/bench_balance.py` compares the packer with others.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

_EXCHANGES: Final = 256
"""Exchanges of samples that are tried for one number of rows; each takes about 0.1 ms of 4,096 samples."""
_ATTEMPTS: Final = 8
"""Numbers of rows that are tried below that of best fit decreasing."""

Rows = list[list[int]]
Numbers = npt.NDArray[np.int64]


def pack(lengths: Sequence[int], capacity: int, multiple: int = 1) -> Rows:
    """Divide samples into rows.

    Args:
        lengths: Tokens of each sample, at most `capacity`; the caller has refused or cut longer samples.
        capacity: Largest number of tokens of a row.
        multiple: The number of rows is a multiple of this, with empty rows if there are too few samples.

    Returns:
        The indices of the samples of each row, ascending; every sample is in exactly one row.
    """
    row_of, num_rows = row_numbers(np.asarray(lengths, np.int64), capacity, multiple)
    return listed(row_of, num_rows)


def listed(row_of: Numbers, num_rows: int) -> Rows:
    """List the samples of each row, ascending.

    Args:
        row_of: int64 (N,), the row of each sample.
        num_rows: Number of rows.

    Returns:
        The indices of the samples of each row.
    """
    flat = np.argsort(row_of, kind="stable").tolist()
    ends = np.cumsum(np.bincount(row_of, minlength=num_rows)).tolist()
    return [flat[begin:end] for begin, end in pairwise((0, *ends))]


def row_numbers(lengths: Numbers, capacity: int, multiple: int = 1) -> tuple[Numbers, int]:
    """Divide samples into rows, see `pack`.

    Args:
        lengths: int64 (N,), tokens of each sample, at most `capacity`.
        capacity: Largest number of tokens of a row.
        multiple: The number of rows is a multiple of this.

    Returns:
        The row of each sample, int64 (N,), and the number of rows.
    """
    longest = int(lengths.max(initial=0))
    assert longest <= capacity, f"a sample of {longest} tokens in rows of {capacity}"
    order, tokens = np.argsort(-lengths, kind="stable").tolist(), lengths.tolist()
    fewest = -(-fewest_rows(lengths, capacity) // multiple) * multiple
    found = _even_rows(order, tokens, capacity, fewest)
    if found is not None:
        return found, fewest
    fitted, least = _best_fit(order, tokens, capacity)
    most = -(-least // multiple) * multiple
    step = -(-max(most - fewest, multiple) // (_ATTEMPTS * multiple)) * multiple
    for num_rows in (*range(fewest + step, most, step), *([most] if most > fewest else [])):
        found = _even_rows(order, tokens, capacity, num_rows)
        if found is not None:
            return found, num_rows
    return np.array(fitted, np.int64), most


def fewest_rows(lengths: Sequence[int] | Numbers, capacity: int) -> int:
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
    most = np.arange(1, capacity // max(int(found[-1]), 1) + 1)
    counts = np.searchsorted(-found, -capacity / (most + 1))
    bound = max(bound, int((-(-counts // most)).max(initial=0)))
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
        lengths: Tokens of each sample, at least 1.
        capacity: Largest number of tokens of a row.

    Returns:
        The indices of the samples of each row.
    """
    row_of, num_rows = _best_fit(order, lengths, capacity)
    return listed(np.array(row_of, np.int64), num_rows)


def _best_fit(order: Sequence[int], lengths: Sequence[int], capacity: int) -> tuple[list[int], int]:
    """Return the row of each sample, and the number of rows."""
    row_of, num_rows = [0] * len(order), 0
    rows_with: defaultdict[int, list[int]] = defaultdict(list)  # by tokens of room, the one that was filled last behind
    rooms = 0  # bit n is set where a row has room for n tokens and no more
    for index in order:
        length = lengths[index]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # the smallest
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
        else:
            row, room, num_rows = num_rows, capacity, num_rows + 1
        row_of[index] = row
        rows_with[room - length].append(row)
        rooms |= 1 << (room - length)
    return row_of, num_rows


def _even_rows(order: Sequence[int], lengths: Sequence[int], capacity: int, num_rows: int) -> Numbers | None:
    """Fill `num_rows` rows evenly and return the row of each sample; None if a row stays too full."""
    row_of, first = [0] * len(order), order[:num_rows]  # of which each gets an empty row
    for row, index in enumerate(first):
        row_of[index] = row
    # tokens x number of rows + row, so that the emptiest row is first, and then the first
    heap = [lengths[index] * num_rows + row for row, index in enumerate(first)]
    heap += range(len(first), num_rows)
    heapq.heapify(heap)
    for index in order[num_rows:]:
        row_of[index] = heap[0] % num_rows
        heapq.heapreplace(heap, heap[0] + lengths[index] * num_rows)
    exchanges = _Exchanges(np.array(row_of, np.int64), num_rows, np.asarray(lengths, np.int64), capacity)
    return exchanges.row_of if exchanges.done() else None


class _Exchanges:
    """Moves samples out of rows that are too full, or exchanges them for shorter ones."""

    def __init__(self, row_of: Numbers, num_rows: int, lengths: Numbers, capacity: int) -> None:
        self.row_of, self.lengths, self.capacity = row_of, lengths, capacity
        self.tokens = np.bincount(row_of, weights=lengths, minlength=num_rows).astype(np.int64)

    def done(self) -> bool:
        """Exchange until all rows fit; False if they do not within the number of exchanges allowed."""
        if not len(self.tokens):
            return True
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
        mine = np.flatnonzero(self.row_of == row)
        for index in mine[np.argsort(self.lengths[mine], kind="stable")].tolist():
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
            self.tokens[self.row_of[index]] -= self.lengths[index]
            self.tokens[to] += self.lengths[index]
            self.row_of[index] = to
