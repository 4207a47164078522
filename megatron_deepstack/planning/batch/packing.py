"""Packs: several samples in one sequence. Each sample attends only to itself, and its positions begin at 0.

`packer` decides which samples share a pack.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_deepstack.planning.batch.sequence import ExpandedSample, Span
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.planning.exchange.routes import PlannedSample


def merge(samples: Sequence[PlannedSample]) -> PlannedSample:
    """Join several samples to one pack. Images are numbered through from the first sample to the last."""
    starts = np.cumsum([0, *(s.sequence.length for s in samples)])
    images = np.cumsum([0, *(len(s.grids) for s in samples)])
    spans = [
        Span(image=int(first_image) + span.image, start=int(start) + span.start, length=span.length)
        for sample, start, first_image in zip(samples, starts[:-1], images[:-1], strict=True)
        for span in sample.sequence.spans
    ]
    sequence = ExpandedSample(
        tokens=np.concatenate([s.sequence.tokens for s in samples]),
        labels=np.concatenate([s.sequence.labels for s in samples]),
        spans=tuple(spans),
        ends=tuple(int(end) for end in starts[1:]),
    )
    return PlannedSample(sequence=sequence, grids=tuple(grid for s in samples for grid in s.grids))


def filler() -> PlannedSample:
    """Return a sample of one token without targets, for schedules that need a certain number of micro-batches."""
    tokens = np.zeros(1, np.int64)
    return PlannedSample(
        sequence=ExpandedSample(tokens=tokens, labels=np.full_like(tokens, IGNORE_INDEX), spans=(), ends=(1,)), grids=()
    )
