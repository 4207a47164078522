"""Which tokens of a micro-batch belong to which sample, for losses that are taken sample by sample.

The loss that balances experts compares the tokens of one sample with each other. It is computed on each rank from the
tokens that the rank holds, so a rank needs to know whose they are, in numbers that a device can multiply with.

Legend: K samples of a micro-batch, B its rows, S positions that this rank holds of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_deepstack.planning.batch.sequence import Tokens
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.planning.exchange.routes import PlannedSample


@dataclass(frozen=True, slots=True)
class Member:
    """One sample in a micro-batch."""

    row: int
    """The row of the micro-batch that it lies in."""
    begin: int
    """Its first position in the row."""
    stop: int
    """The position after its last token; padding behind it is not counted."""
    num_targets: int
    """Number of its tokens whose successor is learned."""


def members_of(batch: Sequence[PlannedSample]) -> tuple[Member, ...]:
    """List the samples of a micro-batch.

    Args:
        batch: Its rows: samples or packs.

    Returns:
        The samples, row by row.
    """
    found = []
    for row, sample in enumerate(batch):
        ends, labels = sample.sequence.ends, sample.sequence.labels
        padding = sample.sequence.padding or (0,) * len(ends)
        for (begin, end), more in zip(pairwise((0, *ends)), padding, strict=True):
            targets = int((labels[begin:end] != IGNORE_INDEX).sum())
            found.append(Member(row=row, begin=begin, stop=end - more, num_targets=targets))
    return tuple(found)


def membership(members: Sequence[Member], num_rows: int, places: Tokens) -> tuple[Tokens, Tokens]:
    """Say whose the tokens of one rank are, and how large each sample is.

    Args:
        members: The samples of a micro-batch.
        num_rows: Its rows, B.
        places: int64 (S,), the positions of the whole row that this rank holds, in their order on it.

    Returns:
        int64 (S * B,), the number of the sample that the token at flat position `s * B + b` belongs to, -1 for padding;
        and int64 (K, 2), the targets and the tokens of each sample.
    """
    owners = np.full((len(places), num_rows), -1, np.int64)
    for index, member in enumerate(members):
        owners[(places >= member.begin) & (places < member.stop), member.row] = index
    sizes = [(member.num_targets, member.stop - member.begin) for member in members]
    return owners.reshape(-1), np.array(sizes, np.int64).reshape(-1, 2)
