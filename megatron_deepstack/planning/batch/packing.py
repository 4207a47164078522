"""Packs: several samples in one row, each attending to itself alone, positions restarting with each.

Packing is first-fit decreasing: close to the fewest rows possible (at most 11/9 of them and a constant; Johnson 1973),
and a pure function of the lengths, so all ranks agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_deepstack.planning.batch.sequence import ExpandedSample, Span
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.planning.exchange.routes import PlannedSample


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the samples of each row; every sample is in one row, and no row is longer than `capacity`.

    A sample of more than `capacity` tokens is a mistake of the caller, who refuses or cuts them.
    """
    assert max(lengths, default=0) <= capacity, f"a sample of {max(lengths)} tokens in rows of {capacity}"
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, left in enumerate(room) if left >= lengths[index]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return [sorted(row) for row in rows]


def merge(samples: Sequence[PlannedSample]) -> PlannedSample:
    """One row made of several samples, images numbered on from sample to sample."""
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
    """A row without targets, for schedules that need a certain number of micro-batches."""
    tokens = np.zeros(1, np.int64)
    return PlannedSample(
        sequence=ExpandedSample(tokens=tokens, labels=np.full_like(tokens, IGNORE_INDEX), spans=(), ends=(1,)), grids=()
    )
