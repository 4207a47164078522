"""Packs: several samples in one sequence. Each sample attends only to itself, and its positions begin at 0.

Packing is first-fit decreasing, which needs at most 11/9 of the smallest possible number of packs, and a constant
(Johnson 1973). It is a pure function of the lengths, so all ranks agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_deepstack.planning.batch.sequence import ExpandedSample, Span
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.planning.exchange.routes import PlannedSample


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Divide samples into packs.

    Args:
        lengths: Tokens of each sample, at most `capacity`; the caller has refused or cut longer samples.
        capacity: Largest number of tokens of a pack.

    Returns:
        The indices of the samples of each pack, ascending; every sample is in exactly one pack.
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
