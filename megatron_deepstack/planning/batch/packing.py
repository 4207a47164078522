"""Packs: several samples in one sequence. Each sample attends only to itself, and its positions begin at 0.

`packer` decides which samples share a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from megatron_deepstack.planning.batch.sequence import ExpandedSample, Span
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.planning.exchange.routes import PlannedSample

Length = TypeVar("Length", int, npt.NDArray[np.int64])


def padded_sample_length(length: Length, multiple: int) -> Length:
    """Return the length that a sample takes in a pack.

    Args:
        length: Its tokens, or those of several samples.
        multiple: See `sizes.sample_multiple`.

    Returns:
        The next multiple.
    """
    return -(-length // multiple) * multiple


def merge(samples: Sequence[PlannedSample], multiple: int = 1) -> PlannedSample:
    """Join several samples to one pack. Images are numbered through from the first sample to the last.

    Args:
        samples: The samples in their order in the pack.
        multiple: The length of each is padded up to a multiple of this, with tokens that are no targets. They follow
            the sample, so under causal attention it does not see them.

    Returns:
        The pack.
    """
    padding = [padded_sample_length(s.sequence.length, multiple) - s.sequence.length for s in samples]
    starts = np.cumsum([0, *(s.sequence.length + more for s, more in zip(samples, padding, strict=True))])
    images = np.cumsum([0, *(len(s.grids) for s in samples)])
    spans = [
        Span(image=int(first_image) + span.image, start=int(start) + span.start, length=span.length)
        for sample, start, first_image in zip(samples, starts[:-1], images[:-1], strict=True)
        for span in sample.sequence.spans
    ]
    sequence = ExpandedSample(
        tokens=np.concatenate([np.pad(s.sequence.tokens, (0, more)) for s, more in zip(samples, padding, strict=True)]),
        labels=np.concatenate(
            [
                np.pad(s.sequence.labels, (0, more), constant_values=IGNORE_INDEX)
                for s, more in zip(samples, padding, strict=True)
            ]
        ),
        spans=tuple(spans),
        ends=tuple(int(end) for end in starts[1:]),
        padding=tuple(padding) if any(padding) else (),
    )
    return PlannedSample(sequence=sequence, grids=tuple(grid for s in samples for grid in s.grids))


def filler(length: int = 1) -> PlannedSample:
    """Return a sample without targets, for schedules that need a certain number of micro-batches.

    Args:
        length: Its tokens; a multiple of `sizes.sample_multiple` if it is a pack by itself.

    Returns:
        The sample.
    """
    tokens = np.zeros(length, np.int64)
    labels = np.full_like(tokens, IGNORE_INDEX)
    return PlannedSample(sequence=ExpandedSample(tokens=tokens, labels=labels, spans=(), ends=(length,)), grids=())
