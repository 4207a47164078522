"""The plan of a training step for one rank: padded micro-batches, and the rank's side of the exchange.

Legend: M is the number of micro-batches, B is samples of a micro-batch, S is the padded length of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig
from megatron_deepstack.planning.batch.sequence import Tokens, padded_length
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.planning.exchange.routes import PlannedSample, RankRoutes, plan_routes


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a rank needs to know about a step before it uses a device."""

    seq_length: int
    """S: the padded length of all micro-batches, for the whole sequence before it is split over ranks."""
    tokens: tuple[Tokens, ...]
    """For each micro-batch int64 (B, S) token ids; 0 at visual positions and in the padding."""
    labels: tuple[Tokens, ...]
    """For each micro-batch int64 (B, S) next tokens, IGNORE_INDEX if the next token is not a target."""
    segments: tuple[tuple[int, ...], ...] | None
    """For each micro-batch the ends of the pack's samples; padding counts as a last sample. None without packs."""
    routes: RankRoutes
    """The rank's side of the exchange."""
    lengths: tuple[int, ...]
    """Tokens of each of the replica's samples, including visual tokens, without padding."""

    @property
    def num_units(self) -> int:
        """Number of units that the replica encodes, each counted once."""
        return self.routes.num_units

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches, M."""
        return len(self.tokens)

    @property
    def micro_batch_size(self) -> int:
        """Number of samples or packs of a micro-batch, B."""
        return int(self.tokens[0].shape[0])


def plan_step(
    model: ModelConfig,
    parallel: ParallelConfig,
    micro_batches: Sequence[Sequence[PlannedSample]],
    replica_rank: int,
    *,
    packed: bool = False,
    precision: Precision = Precision.FP32,
) -> StepPlan:
    """Plan a step of one replica for one of its ranks. The function is pure, so the plans of all ranks fit together.

    Args:
        model: The recipe's model.
        parallel: The layout.
        micro_batches: All samples of the replica, by micro-batch; the same on all of its ranks.
        replica_rank: The rank within the replica, see `plan_routes`.
        packed: Whether each micro-batch is one pack, made by `packing.merge`.
        precision: Precision of matrix products, which may need a longer padding.

    Returns:
        The plan of this rank.
    """
    seq_length = padded_length([s.sequence.length for batch in micro_batches for s in batch], parallel, precision)
    segments = tuple(_segments(batch, seq_length) for batch in micro_batches) if packed else None
    return StepPlan(
        seq_length=seq_length,
        tokens=tuple(_pad([s.sequence.tokens for s in batch], seq_length, 0) for batch in micro_batches),
        labels=tuple(_pad([s.sequence.labels for s in batch], seq_length, IGNORE_INDEX) for batch in micro_batches),
        segments=segments,
        routes=plan_routes(model, parallel, micro_batches, seq_length, replica_rank, segments),
        lengths=tuple(length for batch in micro_batches for sample in batch for length in _lengths(sample)),
    )


def _lengths(sample: PlannedSample) -> tuple[int, ...]:
    """Return the number of tokens of each sample in a pack, without padding."""
    ends = sample.sequence.ends
    padding = sample.sequence.padding or (0,) * len(ends)
    return tuple(end - begin - more for (begin, end), more in zip(pairwise((0, *ends)), padding, strict=True))


def _segments(batch: Sequence[PlannedSample], seq_length: int) -> tuple[int, ...]:
    (row,) = batch
    ends = row.sequence.ends
    return ends if ends[-1] == seq_length else (*ends, seq_length)


def _pad(rows: Sequence[Tokens], length: int, value: int) -> Tokens:
    padded = np.full((len(rows), length), value, np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
