"""Where the targets of a micro-batch are: the output layer and the loss need no other positions.

Under sequence parallelism each tp rank holds a piece of the sequence, and the output layer gathers rows of all pieces,
which must be equally many: shorter pieces are filled with position 0, whose label is IGNORE_INDEX.

Legend: B samples of a micro-batch, S positions that a cp rank holds of each, R rows of a piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron_deepstack.planning.batch.sequence import Tokens
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX

ROWS_MULTIPLE: Final = 16
"""R is a multiple of this, or all positions: matrix products are slower with other numbers of rows."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets of one micro-batch on one cp rank."""

    rows: Tokens
    """int64 (pieces, R): flat positions `s * B + b` within each tp rank's piece; one piece without sequence
    parallelism."""
    labels: Tokens
    """int64 (pieces, R): the labels there, IGNORE_INDEX where a row only fills up."""


def find_targets(labels: Tokens, pieces: int) -> Targets:
    """Find the targets of a micro-batch.

    Args:
        labels: int64 (B, S), the labels of one cp rank.
        pieces: Tp ranks that share these positions: tp under sequence parallelism, otherwise 1.

    Returns:
        The targets in the order of their positions; R is at least 1.
    """
    flat = np.ascontiguousarray(labels.T).reshape(pieces, -1)
    targets = flat != IGNORE_INDEX
    longest = max(int(targets.sum(axis=1).max(initial=0)), 1)
    count = min(-(-longest // ROWS_MULTIPLE) * ROWS_MULTIPLE, flat.shape[1])
    rows, found = np.zeros((pieces, count), np.int64), np.full((pieces, count), IGNORE_INDEX)
    for piece in range(pieces):
        here = np.flatnonzero(targets[piece])
        rows[piece, : len(here)], found[piece, : len(here)] = here, flat[piece, here]
    return Targets(rows=rows, labels=found)
