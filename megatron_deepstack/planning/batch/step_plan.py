"""The plan of a training step for one rank: padded micro-batches, and the rank's side of the exchange.

Legend: M is the number of micro-batches, B is samples of a micro-batch, S is the padded length of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_deepstack.config.choices import Batching, Precision
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, TrainConfig
from megatron_deepstack.planning.batch.axial_positions import axial_positions
from megatron_deepstack.planning.batch.members import Member, members_of
from megatron_deepstack.planning.batch.sequence import Tokens, padded_lengths, row_lengths
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.planning.exchange.routes import PlannedSample, RankRoutes, plan_routes
from megatron_deepstack.planning.views import ViewGrid


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a rank needs to know about a step before it uses a device."""

    seq_lengths: tuple[int, ...]
    """S of each micro-batch: its padded length, for the whole sequence before it is split over ranks."""
    tokens: tuple[Tokens, ...]
    """For each micro-batch int64 (B, S) token ids; 0 at visual positions and in the padding."""
    labels: tuple[Tokens, ...]
    """For each micro-batch int64 (B, S) next tokens, IGNORE_INDEX if the next token is not a target."""
    positions: tuple[Tokens, ...] | None
    """For each micro-batch int64 (3, B, S) positions in time, line and column, for decoders that rotate by three axes;
    None for all others, whose positions are the places in the sample."""
    segments: tuple[tuple[int, ...], ...] | None
    """For each micro-batch the ends of the pack's samples; padding counts as a last sample. None without packs."""
    routes: RankRoutes
    """The rank's side of the exchange."""
    members: tuple[tuple[Member, ...], ...]
    """For each micro-batch its samples, and where their tokens are."""
    lengths: tuple[int, ...]
    """Tokens of each of the replica's samples, including visual tokens, without padding."""

    @property
    def seq_length(self) -> int:
        """S of the longest micro-batch."""
        return max(self.seq_lengths)

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
    seq_lengths: Sequence[int] | None = None,
) -> StepPlan:
    """Plan a step of one replica for one of its ranks. The function is pure, so the plans of all ranks fit together.

    Args:
        model: The recipe's model.
        parallel: The layout.
        micro_batches: All samples of the replica, by micro-batch; the same on all of its ranks.
        replica_rank: The rank within the replica, see `plan_routes`.
        packed: Whether each micro-batch is one pack, made by `packing.merge`.
        precision: Precision of matrix products, which may need a longer padding.
        seq_lengths: S of each micro-batch; None for what `padded_lengths` chooses.

    Returns:
        The plan of this rank.
    """
    lengths = [[sample.sequence.length for sample in batch] for batch in micro_batches]
    seq_lengths = tuple(seq_lengths or padded_lengths(lengths, parallel, precision))
    padded = list(zip(micro_batches, seq_lengths, strict=True))
    segments = tuple(_segments(batch, length) for batch, length in padded) if packed else None
    return StepPlan(
        seq_lengths=seq_lengths,
        tokens=tuple(_pad([s.sequence.tokens for s in batch], length, 0) for batch, length in padded),
        labels=tuple(_pad([s.sequence.labels for s in batch], length, IGNORE_INDEX) for batch, length in padded),
        positions=_positions(model, padded),
        segments=segments,
        routes=plan_routes(model, parallel, micro_batches, seq_lengths, replica_rank, segments),
        members=tuple(members_of(batch) for batch in micro_batches),
        lengths=tuple(length for batch in micro_batches for sample in batch for length in _lengths(sample)),
    )


def plan_training_step(
    model: ModelConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    micro_batches: Sequence[Sequence[PlannedSample]],
    replica_rank: int,
) -> StepPlan:
    """Plan a step of training as the recipe batches it; pure, as `plan_step` is.

    Args:
        model: The recipe's model.
        parallel: The layout.
        train: Says whether samples are packed, how long rows are, and in which precision matrices are multiplied.
        micro_batches: All samples of the replica, by micro-batch; the same on all of its ranks.
        replica_rank: The rank within the replica, see `plan_routes`.

    Returns:
        The plan of this rank.
    """
    lengths = [[sample.sequence.length for sample in batch] for batch in micro_batches]
    return plan_step(
        model,
        parallel,
        micro_batches,
        replica_rank,
        packed=train.batching is Batching.PACKED,
        precision=train.precision,
        seq_lengths=row_lengths(lengths, parallel, train),
    )


def _lengths(sample: PlannedSample) -> tuple[int, ...]:
    """Return the number of tokens of each sample in a pack, without padding."""
    ends = sample.sequence.ends
    padding = sample.sequence.padding or (0,) * len(ends)
    return tuple(end - begin - more for (begin, end), more in zip(pairwise((0, *ends)), padding, strict=True))


def _positions(
    model: ModelConfig, padded_batches: Sequence[tuple[Sequence[PlannedSample], int]]
) -> tuple[Tokens, ...] | None:
    if model.language.mrope_section is None:
        return None
    found = []
    for batch, seq_length in padded_batches:
        padded = np.zeros((3, len(batch), seq_length), np.int64)
        for index, sample in enumerate(batch):
            grids = [grid for grid in sample.grids if isinstance(grid, ViewGrid)]
            assert len(grids) == len(sample.grids), "positions on three axes need the patches of each view"
            own = axial_positions(sample.sequence, grids, model.vision.merge_size)
            length = sample.sequence.length
            padded[:, index, :length] = own
            padded[:, index, length:] = own.max(initial=-1) + 1 + np.arange(seq_length - length)
        found.append(padded)
    return tuple(found)


def _segments(batch: Sequence[PlannedSample], seq_length: int) -> tuple[int, ...]:
    (row,) = batch
    ends = row.sequence.ends
    return ends if ends[-1] == seq_length else (*ends, seq_length)


def _pad(rows: Sequence[Tokens], length: int, value: int) -> Tokens:
    padded = np.full((len(rows), length), value, np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
