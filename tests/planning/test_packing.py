"""Samples of a pack lie behind each other, and images keep their numbers."""

from __future__ import annotations

import numpy as np

from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.planning.batch.packing import filler, merge
from megatron_deepstack.planning.batch.step_plan import plan_step
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
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


def test_samples_are_padded_for_context_ranks() -> None:
    """Each to the multiple, with tokens that are no targets; what is counted as its length stays."""
    model, parallel = tiny_model(), ParallelConfig(context=2)
    samples = [s.planned(model, 1000) for s in tiny_samples(model, 4)]
    row = merge(samples, 4)
    begin = 0
    for sample, end, more in zip(samples, row.sequence.ends, row.sequence.padding, strict=True):
        assert end % 4 == 0
        length = sample.sequence.length
        assert end - begin == length + more
        assert more < 4
        assert np.array_equal(row.sequence.tokens[begin : begin + length], sample.sequence.tokens)
        assert (row.sequence.labels[begin + length : end] == IGNORE_INDEX).all()
        begin = end
    plan = plan_step(model, parallel, [[row], [filler(4)]], 0, packed=True)
    assert plan.lengths == (*(s.sequence.length for s in samples), 4)
    assert plan.segments is not None
    assert all(end % 4 == 0 for ends in plan.segments for end in ends)
    assert merge(samples).sequence.padding == ()
