"""Samples of a pack lie behind each other, and images keep their numbers."""

from __future__ import annotations

import numpy as np

from megatron_deepstack.planning.batch.packing import filler, merge
from megatron_deepstack.testing.tiny import tiny_model, tiny_samples


def test_merged_samples_lie_behind_each_other() -> None:
    model = tiny_model()
    samples = [s.planned(model, 1000) for s in tiny_samples(model, 4)]
    row = merge(samples)
    assert row.sequence.ends == tuple(np.cumsum([s.sequence.length for s in samples]))
    assert row.grids == tuple(grid for s in samples for grid in s.grids)
    assert [span.image for span in row.sequence.spans] == list(range(len(row.grids)))
    third = samples[2].sequence
    start = row.sequence.ends[1]
    assert np.array_equal(row.sequence.tokens[start : start + third.length], third.tokens)
    assert [s.start for s in row.sequence.spans][1:3] == [start + s.start for s in third.spans]


def test_a_filler_has_no_target() -> None:
    assert (filler().sequence.labels < 0).all()
