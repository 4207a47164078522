"""From a stored sample to its place in a micro-batch: placeholders opened up, next-token labels, padded length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.config.sizes import sequence_multiple
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_deepstack.planning.budget.linears import FP8_TOKENS

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """Where an image lies in its expanded sequence."""

    image: int
    """Number of the image within the sample."""
    start: int
    """First position."""
    length: int
    """Positions left after truncation, 0 if none."""


@dataclass(frozen=True, slots=True)
class ExpandedSample:
    """An expanded sample."""

    tokens: Tokens
    """Token ids (T,); 0 where an image's base tokens will be."""
    labels: Tokens
    """Next token at each position (T,), IGNORE_INDEX where there is no target."""
    spans: tuple[Span, ...]
    """Images in order of appearance."""
    ends: tuple[int, ...]
    """Where each sample ends: one number, or several in a pack."""

    @property
    def length(self) -> int:
        """T, visual tokens included."""
        return len(self.tokens)


def expand(
    sample_id: str,
    tokens: npt.NDArray[np.integer],
    loss_mask: npt.NDArray[np.integer],
    context_lengths: Sequence[int],
    *,
    seq_length: int,
    truncate: bool,
) -> ExpandedSample:
    """Open each placeholder into its image's context and shift targets to the position that predicts them.

    `tokens` (T0,) holds IMAGE_TOKEN_ID once per image, `loss_mask` (T0,) is 1 where the token itself is a target.
    Raises DataError if placeholders and images differ in number, or the result exceeds `seq_length` and may not
    be cut.
    """
    places = np.flatnonzero(tokens == IMAGE_TOKEN_ID)
    if len(places) != len(context_lengths):
        raise DataError(
            f"sample {sample_id}: {len(places)} image placeholders but {len(context_lengths)} images; "
            "run preprocess again on corrected records"
        )
    repeats = np.ones(len(tokens), dtype=np.int64)
    repeats[places] = context_lengths
    visual = np.repeat(tokens == IMAGE_TOKEN_ID, repeats)
    opened = np.where(visual, 0, np.repeat(tokens, repeats)).astype(np.int64)
    target = np.repeat(loss_mask.astype(bool), repeats) & ~visual
    if len(opened) > seq_length:
        if not truncate:
            raise DataError(
                f"sample {sample_id}: {len(opened)} tokens, {int(visual.sum())} of them visual, exceed "
                f"train.seq_length {seq_length}; raise it, shorten the answer, or set train.truncate=true"
            )
        opened, target = opened[:seq_length], target[:seq_length]
    labels = np.full_like(opened, IGNORE_INDEX)
    labels[:-1] = np.where(target[1:], opened[1:], IGNORE_INDEX)
    starts = np.cumsum(repeats) - repeats
    left = np.clip(len(opened) - starts, 0, repeats)
    spans = tuple(Span(image=k, start=int(starts[place]), length=int(left[place])) for k, place in enumerate(places))
    return ExpandedSample(tokens=opened, labels=labels, spans=spans, ends=(len(opened),))


def padded_length(lengths: Sequence[int], parallel: ParallelConfig, precision: Precision = Precision.FP32) -> int:
    """Common length of a step's micro-batches: the longest sample, rounded up to what splits and products need."""
    longest = max(lengths, default=1)
    multiple = math.lcm(sequence_multiple(parallel), FP8_TOKENS * parallel.context if precision is Precision.FP8 else 1)
    return -(-longest // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring positions of the whole sequence that one rank holds one after the other."""

    first: int
    """First position in the whole sequence."""
    stop: int
    """One past the last."""
    local: int
    """Where `first` lies in the rank's own shard."""


@dataclass(frozen=True, slots=True)
class SequenceShards:
    """How ranks of a stage share a sequence: zigzag chunks over cp (of 2 cp chunks, rank i holds i and 2 cp - 1 - i),
    each rank's part then cut over tp under sequence parallelism.

    Shards are numbered `cp * tp_shards + tp`.
    """

    seq_length: int
    """S: padded length of the whole sequence, which `sequence_multiple` divides."""
    context: int
    tp_shards: int
    """tp under sequence parallelism, else 1: every tp rank holds all of its cp rank's positions."""

    @classmethod
    def of(cls, parallel: ParallelConfig, seq_length: int) -> SequenceShards:
        """The shards of a layout for sequences of `seq_length` positions."""
        return cls(seq_length, parallel.context, parallel.tensor if parallel.sequence_parallel else 1)

    def stretches(self, cp: int, tp: int) -> tuple[Stretch, ...]:
        """What the rank at (cp, tp) holds: at most two stretches, in the order of the sequence."""
        shard_length = self.seq_length // self.context // self.tp_shards
        begin = tp * shard_length if self.tp_shards > 1 else 0
        if self.context == 1:
            return (Stretch(begin, begin + shard_length, 0),)
        size = self.seq_length // (2 * self.context)
        found = []
        for part, chunk in enumerate((cp, 2 * self.context - 1 - cp)):
            first, stop = max(begin, part * size), min(begin + shard_length, (part + 1) * size)
            if first < stop:
                shift = (chunk - part) * size
                found.append(Stretch(first + shift, stop + shift, first - begin))
        return tuple(found)

    def shard_of(self, position: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """The shard that holds each position of the whole sequence."""
        cp, local = self._context(position)
        return cp * self.tp_shards + local // (self.seq_length // self.context // self.tp_shards)

    def _context(self, position: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
        """cp rank of each position, and the position there."""
        if self.context == 1:
            return np.zeros_like(position), position
        size = self.seq_length // (2 * self.context)
        chunk, offset = np.divmod(position, size)
        rank = np.minimum(chunk, 2 * self.context - 1 - chunk)
        return rank, np.where(chunk < self.context, offset, size + offset)
