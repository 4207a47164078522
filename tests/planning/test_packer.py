"""Rows hold every sample once, whole, and are about as few as a lower bound says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_deepstack.planning.batch.packer import best_fit_decreasing, fewest_rows, pack


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 5))
def test_every_sample_in_one_row(lengths: list[int], multiple: int) -> None:
    rows = pack(lengths, 50, multiple)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 50 for row in rows)
    assert all(row == sorted(row) for row in rows)
    assert len(rows) % multiple == 0
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    most = len(best_fit_decreasing(order, lengths, 50))
    assert fewest_rows(lengths, 50) <= most
    assert len(rows) <= -(-most // multiple) * multiple
    assert most <= max(11 * -(-sum(lengths) // 50) // 9 + 1, 2 * -(-sum(lengths) // 50))


@pytest.mark.parametrize(
    ("lengths", "fewest"),
    [
        ([], 0),
        ([100], 1),
        ([51, 51, 51], 3),
        ([34] * 7, 4),
        ([90, 90, 20, 20, 20], 3),
        ([60, 45, 45, 45], 3),
        ([50, 50, 50, 50], 2),
    ],
    ids=["none", "one", "halves", "two-a-row", "alone", "beside-long-ones", "exactly-halves"],
)
def test_rows_that_samples_force(lengths: list[int], fewest: int) -> None:
    assert fewest_rows(lengths, 100) == fewest
    assert len(pack(lengths, 100)) == fewest


def test_rows_are_even_and_few() -> None:
    """Samples like those of an instruction mix; best fit decreasing needs 3.7 % more rows than the bound."""
    random = np.random.default_rng(0)
    for _ in range(5):
        lengths = np.clip(576 * (random.random(512) < 0.9) + np.exp(random.normal(5.3, 0.8, 512)), 20, 4096)
        whole = lengths.astype(int).tolist()
        rows = pack(whole, 4096, 8)
        sizes = [sum(whole[i] for i in row) for row in rows]
        assert len(rows) <= 1.02 * -(-fewest_rows(whole, 4096) // 8) * 8
        assert max(sizes) <= 1.1 * np.mean(sizes)
