"""One training step of a replica, as one rank carries it out: padded micro-batches, and its side of the exchange."""

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
    """What a rank needs to know of a step before it touches a device."""

    seq_length: int
    """S: common padded length of all micro-batches, the whole sequence before any split."""
    tokens: tuple[Tokens, ...]
    """Per micro-batch (B, S) token ids; 0 at visual positions and in the padding."""
    labels: tuple[Tokens, ...]
    """Per micro-batch (B, S) next tokens, IGNORE_INDEX where there is no target."""
    segments: tuple[tuple[int, ...], ...] | None
    """Per micro-batch the ends of the pack's samples, the padding being a last one; None where rows are not packed."""
    routes: RankRoutes
    lengths: tuple[int, ...]
    """Tokens of each of the replica's samples, visual ones included, padding not."""

    @property
    def num_units(self) -> int:
        """Units that the replica encodes, each counted once."""
        return self.routes.num_units

    @property
    def num_micro_batches(self) -> int:
        """M."""
        return len(self.tokens)

    @property
    def micro_batch_size(self) -> int:
        """B."""
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
    """Plan a step of one replica for one of its ranks; pure, so all ranks agree without a word.

    `packed` says that rows hold several samples (`packing.merge`), and each row is a micro-batch. Lengths are padded to
    what products of `precision` need.
    """
    seq_length = padded_length([s.sequence.length for batch in micro_batches for s in batch], parallel, precision)
    return StepPlan(
        seq_length=seq_length,
        tokens=tuple(_pad([s.sequence.tokens for s in batch], seq_length, 0) for batch in micro_batches),
        labels=tuple(_pad([s.sequence.labels for s in batch], seq_length, IGNORE_INDEX) for batch in micro_batches),
        segments=tuple(_segments(batch, seq_length) for batch in micro_batches) if packed else None,
        routes=plan_routes(model, parallel, micro_batches, seq_length, replica_rank),
        lengths=tuple(length for batch in micro_batches for sample in batch for length in _lengths(sample)),
    )


def _lengths(sample: PlannedSample) -> tuple[int, ...]:
    """Of a row's samples."""
    return tuple(end - begin for begin, end in pairwise((0, *sample.sequence.ends)))


def _segments(batch: Sequence[PlannedSample], seq_length: int) -> tuple[int, ...]:
    (row,) = batch
    ends = row.sequence.ends
    return ends if ends[-1] == seq_length else (*ends, seq_length)


def _pad(rows: Sequence[Tokens], length: int, value: int) -> Tokens:
    padded = np.full((len(rows), length), value, np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
