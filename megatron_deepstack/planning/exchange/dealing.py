"""Which rank encodes which units: evenly and in order where all cost the same, else by cost, the longest first.

Units are numbered rank by rank, so that the units of a rank are neighbours, and the rows that it makes are too. The
units of one rank keep the order of the step.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Dealt:
    """The numbers of the units of a step's images, and of their rows."""

    first_unit: Index
    """For each image the number of its first unit."""
    bounds: Index
    """(ranks + 1,): the first unit of each rank, and at the end the number of all units."""
    first_row: Index
    """(units + 1,): the first row of each unit, and at the end the number of all rows."""


def deal_in_order(num_units: Sequence[int], num_rows: Sequence[int], num_ranks: int) -> Dealt:
    """Give each rank the same number of neighbouring units, to within one.

    Args:
        num_units: For each image the number of its units.
        num_rows: For each image the number of rows of each of its units.
        num_ranks: Number of ranks that encode.

    Returns:
        The numbers; those of an image are neighbours.
    """
    counts = np.array(num_units, np.int64)
    total = int(counts.sum())
    bounds = np.array([total * k // num_ranks for k in range(num_ranks + 1)])
    return Dealt(np.cumsum(counts) - counts, bounds, _starts(np.repeat(np.array(num_rows, np.int64), counts)))


def deal_by_cost(costs: Sequence[float], num_rows: Sequence[int], num_ranks: int) -> Dealt:
    """Give images of one unit to ranks, the most costly first, each to the rank that has least to do.

    The most loaded rank then has at most 4/3 of what the best division would give it (Graham 1969), and one huge image
    holds its rank back by its own cost only.

    Args:
        costs: For each image the cost of its unit.
        num_rows: For each image the number of rows of its unit.
        num_ranks: Number of ranks that encode.

    Returns:
        The numbers.
    """
    owners = np.zeros(len(costs), np.int64)
    loads = [(0.0, rank) for rank in range(num_ranks)]
    for image in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        owners[image] = rank
        heapq.heappush(loads, (load + costs[image], rank))
    order = np.argsort(owners, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    bounds = np.searchsorted(owners[order], np.arange(num_ranks + 1))
    return Dealt(number, bounds, _starts(np.array(num_rows, np.int64)[order]))


def imbalance(costs: Sequence[float], units: Sequence[range], bounds: Index) -> float:
    """Return what the busiest rank has to encode over what a rank has on average; 1 if nothing is encoded.

    Args:
        costs: For each image the cost of each of its units.
        units: For each image the numbers of its units.
        bounds: (ranks + 1,), the first unit of each rank.

    Returns:
        A number from 1 to the number of ranks.
    """
    cost_of_unit = np.zeros(int(bounds[-1]))
    for cost, numbers in zip(costs, units, strict=True):
        cost_of_unit[numbers.start : numbers.stop] = cost
    total = np.concatenate([[0.0], np.cumsum(cost_of_unit)])
    loads = np.diff(total[bounds])
    return float(loads.max() / loads.mean()) if loads.any() else 1.0


def _starts(counts: Index) -> Index:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
