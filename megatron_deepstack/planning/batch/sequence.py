"""Expanding a stored sample for a micro-batch: visual positions, next-token labels, padded length, sequence shards.

Legend: T is the number of positions of an expanded sample, S is the padded length of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from megatron_deepstack.config.choices import Precision, RowLength
from megatron_deepstack.config.schema import ParallelConfig, TrainConfig
from megatron_deepstack.config.sizes import sequence_multiple
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_deepstack.planning.budget.linears import FP8_TOKENS

Tokens = npt.NDArray[np.int64]

_SMALL_WASTE: Final = 0.05
"""Share of padding for which stages do not send shapes before their messages."""


@dataclass(frozen=True, slots=True)
class Span:
    """The positions of an image in its expanded sequence."""

    image: int
    """Number of the image within the sample."""
    start: int
    """First position."""
    length: int
    """Number of positions that are left after truncation; it may be 0."""


@dataclass(frozen=True, slots=True)
class ExpandedSample:
    """A sample with a position for each visual token, or several samples in a pack."""

    tokens: Tokens
    """Token ids (T,); 0 at the positions of visual tokens."""
    labels: Tokens
    """The next token at each position (T,), IGNORE_INDEX if it is not a target."""
    spans: tuple[Span, ...]
    """The images in order of appearance."""
    ends: tuple[int, ...]
    """One past the last position of each sample: one number, or several in a pack."""
    padding: tuple[int, ...] = ()
    """Positions of padding at the end of each sample in a pack; empty if there are none."""

    @property
    def length(self) -> int:
        """Number of positions T, including visual tokens."""
        return len(self.tokens)

    @property
    def num_tokens(self) -> int:
        """Number of positions without the padding of samples in a pack."""
        return len(self.tokens) - sum(self.padding)


def expand(
    sample_id: str,
    tokens: npt.NDArray[np.integer],
    loss_mask: npt.NDArray[np.integer],
    context_lengths: Sequence[int],
    *,
    seq_length: int,
    truncate: bool,
) -> ExpandedSample:
    """Replace each placeholder by the positions of its image, and shift targets to the position that predicts them.

    Args:
        sample_id: Id of the sample, for messages.
        tokens: Integers (T0,), token ids with IMAGE_TOKEN_ID once per image.
        loss_mask: Integers (T0,), 1 where the token is a target.
        context_lengths: Number of positions that each image takes.
        seq_length: Largest length of an expanded sample.
        truncate: Whether a longer sample is cut; otherwise it is an error.

    Returns:
        The expanded sample, with T at most `seq_length`.

    Raises:
        DataError: Placeholders and images differ in number, or the sample is too long and must not be cut.
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
    """Return the common length of samples that are computed together.

    Args:
        lengths: Tokens of each sample or pack.
        parallel: The layout, which splits sequences.
        precision: Precision of matrix products; FP8 needs token counts in multiples of 32 on each rank.

    Returns:
        S: the largest length, rounded up to the multiple that the layout and the precision need.
    """
    multiple = _multiple(parallel, precision)
    return -(-max(lengths, default=1) // multiple) * multiple


def _multiple(parallel: ParallelConfig, precision: Precision) -> int:
    return math.lcm(sequence_multiple(parallel), FP8_TOKENS * parallel.context if precision is Precision.FP8 else 1)


def padded_lengths(
    lengths: Sequence[Sequence[int]], parallel: ParallelConfig, precision: Precision = Precision.FP32
) -> tuple[int, ...]:
    """Return the padded length of each micro-batch of a step.

    Micro-batches need not have one length where nothing is sent between stages, or where the schedule sends the shape
    before each message, as 1F1B can. Where lengths are nearly the same, sending shapes would only cost time.

    Args:
        lengths: For each micro-batch of a replica the tokens of its samples or packs.
        parallel: The layout, which splits sequences.
        precision: Precision of matrix products.

    Returns:
        S of each micro-batch. All are equal under the interleaved schedule, and in a pipeline where this wastes little.
    """
    longest = np.array([[max(batch, default=1) for batch in lengths]], np.int64)
    return tuple(padded_table(longest, parallel, precision)[0].tolist())


def padded_table(longest: Tokens, parallel: ParallelConfig, precision: Precision = Precision.FP32) -> Tokens:
    """Return the padded length of each micro-batch of several replicas at once; see `padded_lengths`.

    Args:
        longest: int64 (replicas, micro-batches), the tokens of the longest sample or pack of each.
        parallel: The layout, which splits sequences.
        precision: Precision of matrix products.

    Returns:
        int64 (replicas, micro-batches), S of each.
    """
    multiple = _multiple(parallel, precision)
    each: Tokens = -(-longest // multiple) * multiple
    if parallel.pipeline == 1 or not each.size:
        return each
    common = np.broadcast_to(each.max(axis=1, keepdims=True), each.shape)
    waste = 1 - each.sum(axis=1) / common.sum(axis=1)
    differ = (parallel.virtual_pipeline == 1) & (waste > _SMALL_WASTE)
    return np.where(differ[:, None], each, common)


def row_lengths(lengths: Sequence[Sequence[int]], parallel: ParallelConfig, train: TrainConfig) -> tuple[int, ...]:
    """Return the padded length of each micro-batch of a training step.

    Args:
        lengths: For each micro-batch of a replica the tokens of its samples or packs, none above `train.seq_length`.
        parallel: The layout, which splits sequences.
        train: Says whether all rows have the full length.

    Returns:
        S of each micro-batch.
    """
    longest = np.array([[max(batch, default=1) for batch in lengths]], np.int64)
    return tuple(row_table(longest, parallel, train)[0].tolist())


def row_table(longest: Tokens, parallel: ParallelConfig, train: TrainConfig) -> Tokens:
    """Return the padded length of each micro-batch of several replicas at once; see `row_lengths`.

    Args:
        longest: int64 (replicas, micro-batches), the tokens of the longest sample or pack of each.
        parallel: The layout, which splits sequences.
        train: Says whether all rows have the full length.

    Returns:
        int64 (replicas, micro-batches), S of each.
    """
    if train.row_length is RowLength.FULL:
        return np.full_like(longest, padded_length([train.seq_length], parallel, train.precision))
    return padded_table(longest, parallel, train.precision)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring positions of the whole sequence that one rank holds in the same order."""

    first: int
    """First position in the whole sequence."""
    stop: int
    """One past the last position."""
    local: int
    """Position of `first` in the rank's own shard."""


@dataclass(frozen=True, slots=True)
class SequenceShards:
    """How the ranks of a stage share a sequence.

    Of 2 cp equal pieces, cp rank i holds the pieces i and 2 cp - 1 - i (zigzag). The samples of a pack are split so one
    by one, and a rank holds its pieces of all of them, in the order of the samples. Under sequence parallelism, what
    each cp rank holds is then split evenly over its tp ranks. Shards are numbered `cp * tp_shards + tp`.
    """

    seq_length: int
    """S: padded length of the whole sequence, a multiple of `sequence_multiple`."""
    context: int
    """Size of cp."""
    tp_shards: int
    """Size of tp under sequence parallelism; otherwise 1, and every tp rank holds all positions of its cp rank."""
    ends: tuple[int, ...]
    """Where the parts of the sequence end that are split by themselves: the samples of a pack, or all of it."""

    @classmethod
    def of(cls, parallel: ParallelConfig, seq_length: int, ends: Sequence[int] = ()) -> SequenceShards:
        """Return the shards under a layout.

        Args:
            parallel: The layout.
            seq_length: S, a multiple of `sequence_multiple(parallel)`.
            ends: Where the samples of a pack end, each a multiple of `sample_multiple(parallel)`, the last one being
                `seq_length`; empty for a sequence that is no pack.

        Returns:
            The shards.
        """
        tp_shards = parallel.tensor if parallel.sequence_parallel else 1
        return cls(seq_length, parallel.context, tp_shards, tuple(ends) or (seq_length,))

    def stretches(self, cp: int, tp: int) -> tuple[Stretch, ...]:
        """Return the positions that one rank holds.

        Args:
            cp: Index on the context-parallel axis.
            tp: Index on the tensor-parallel axis.

        Returns:
            At most two stretches of each part, in the order of the rank's shard, which is also that of the sequence.
        """
        shard_length = self.seq_length // self.context // self.tp_shards
        begin = tp * shard_length if self.tp_shards > 1 else 0
        if self.context == 1:
            return (Stretch(begin, begin + shard_length, 0),)
        found = []
        for part_begin, part_end in pairwise((0, *self.ends)):
            size = (part_end - part_begin) // (2 * self.context)
            for number, chunk in enumerate((cp, 2 * self.context - 1 - cp)):
                held = part_begin // self.context + number * size
                first, stop = max(begin, held), min(begin + shard_length, held + size)
                if first < stop:
                    shift = part_begin + chunk * size - held
                    found.append(Stretch(first + shift, stop + shift, first - begin))
        return tuple(found)

    def shard_of(self, position: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """Return the number of the shard that holds each position of the whole sequence; any shape."""
        cp, local = self._context(position)
        return cp * self.tp_shards + local // (self.seq_length // self.context // self.tp_shards)

    def _context(self, position: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
        """Return the cp rank of each position, and the position in what that rank holds."""
        if self.context == 1:
            return np.zeros_like(position), position
        starts = np.array((0, *self.ends[:-1]))
        part = np.searchsorted(self.ends, position, side="right")
        size = (np.diff(self.ends, prepend=0) // (2 * self.context))[part]
        chunk, offset = np.divmod(position - starts[part], size)
        rank = np.minimum(chunk, 2 * self.context - 1 - chunk)
        return rank, starts[part] // self.context + np.where(chunk < self.context, offset, size + offset)
