"""Target positions of a micro-batch, whole and in pieces of tensor-parallel ranks."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_deepstack.planning.batch.targets import ROWS_MULTIPLE, find_targets
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_every_target_once_and_nothing_else(pieces: int, share: float) -> None:
    rng = np.random.default_rng(pieces)
    labels = np.where(rng.random((2, 64)) < share, rng.integers(1, 99, (2, 64)), IGNORE_INDEX)
    found = find_targets(labels, pieces)
    assert found.rows.shape == found.labels.shape == (pieces, found.rows.shape[1])
    positions = labels.T.reshape(pieces, -1)  # flat positions s * B + b of each piece
    taken = np.zeros_like(positions)
    for piece in range(pieces):
        counted = found.labels[piece] != IGNORE_INDEX
        rows = found.rows[piece, counted]
        assert (positions[piece, rows] == found.labels[piece, counted]).all()
        taken[piece, rows] += 1
    assert (taken == (positions != IGNORE_INDEX)).all()


def test_the_number_of_rows_is_a_multiple_or_all() -> None:
    labels = np.full((1, 40), IGNORE_INDEX)
    labels[0, :3] = 7
    assert find_targets(labels, 1).rows.shape == (1, ROWS_MULTIPLE)
    labels[0] = 7
    assert find_targets(labels, 1).rows.shape == (1, 40)
