"""How a step's samples are dealt to replicas: a pure function of their lengths, so all ranks of all replicas agree.

Every replica gets the same number of micro-batches, then nearly the same work in the decoder, and then nearly the same
in the encoder. The loss is a sum over the global batch divided by one count, so it makes no difference which replica
computes which sample. Rows are made of the whole batch and not of each replica's samples: otherwise the replica with
the most rows would hold up all others.

Legend: N samples of the global batch, R replicas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megatron_deepstack.config.choices import Batching
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, ParallelConfig, TrainConfig
from megatron_deepstack.config.sizes import sample_multiple
from megatron_deepstack.planning.batch.packer import row_numbers
from megatron_deepstack.planning.batch.packing import padded_sample_length
from megatron_deepstack.planning.batch.sequence import row_table
from megatron_deepstack.planning.budget.cost import decoder_flops, unit_flops
from megatron_deepstack.planning.views import ViewGrid

Costs = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
MicroBatch = tuple[tuple[int, ...], ...]
"""The samples of each row, as positions in the global batch; a row of no samples is a filler."""

_NEARLY_EQUAL: Final = 0.01
"""A replica may have this share more decoder work than the mean, if that evens out the encoder's."""
_EVEN: Final = 0.001
"""Differences below this share of the mean are left as they are."""
_EXCHANGES: Final = 64
"""Largest number of exchanges of each kind."""
_PARTNERS: Final = 8
"""Idlest replicas with which the busiest one tries to exchange."""
_LOOKED_AT: Final = 128
"""Largest number of a replica's micro-batches that are looked at for an exchange."""


@dataclass(frozen=True, slots=True)
class Balance:
    """What a step loses to padding, and to replicas that wait for the slowest one."""

    padding: float
    """Share of padding among all positions that the decoder computes, over all replicas."""
    imbalance: float
    """Decoder work of the busiest replica above that of the mean replica, as a share of the mean."""


@dataclass(frozen=True, slots=True, eq=False)
class Deal:
    """A step's samples by replica. Legend: M micro-batches of each replica, the most costly first."""

    samples: Numbers
    """int64 (N,), the samples of the whole step, micro-batch after micro-batch, ascending in each."""
    bounds: Numbers
    """int64 (R x M + 1,), where the samples of each micro-batch begin, and where those of the last one end."""
    table: Numbers
    """int64 (R, M), the numbers of each replica's micro-batches."""
    lengths: Numbers
    """int64 (R, M), the padded length of each micro-batch."""
    packed: bool
    """Whether the samples of a micro-batch share a row; otherwise each has its own."""
    balance: Balance

    def replica(self, dp: int) -> tuple[MicroBatch, ...]:
        """Return the micro-batches of one replica.

        Args:
            dp: Number of the replica.

        Returns:
            M micro-batches, the most costly first.
        """
        found = (tuple(self.samples[begin:end].tolist()) for begin, end in self._bounds(dp))
        return tuple((row,) if self.packed else tuple((one,) for one in row) for row in found)

    def members(self, dp: int) -> tuple[Numbers, Numbers]:
        """Return the samples of one replica.

        Args:
            dp: Number of the replica.

        Returns:
            int64 (samples,), the samples in the order of the micro-batches; and the place of its micro-batch of each.
        """
        bounds = self._bounds(dp)
        samples = [self.samples[begin:end] for begin, end in bounds]
        return np.concatenate(samples), np.repeat(np.arange(len(bounds)), [len(one) for one in samples])

    def _bounds(self, dp: int) -> list[tuple[int, int]]:
        mine = self.table[dp]
        return list(zip(self.bounds[mine].tolist(), self.bounds[mine + 1].tolist(), strict=True))

    @property
    def replicas(self) -> tuple[tuple[MicroBatch, ...], ...]:
        """The micro-batches of every replica."""
        return tuple(self.replica(dp) for dp in range(len(self.table)))


@dataclass(frozen=True, slots=True, eq=False)
class _MicroBatches:
    """The micro-batches of a step, before replicas get them."""

    samples: Numbers
    bounds: Numbers
    """As in `Deal`."""
    size: int
    """Rows of a micro-batch."""
    costs: Costs
    """What each costs the decoder."""
    others: Costs
    """What each costs the encoder."""
    longest: Numbers
    """Tokens of the longest row of each."""


class Dealing:
    """Deals the same samples to any number of replicas of any layout; what several of them share is computed once."""

    def __init__(
        self,
        lengths: npt.NDArray[np.integer],
        encoder_costs: npt.NDArray[np.number],
        language: LanguageConfig,
        train: TrainConfig,
    ) -> None:
        self.lengths, self.encoder_costs, self.train = np.asarray(lengths, np.int64), encoder_costs, train
        self.cost = decoder_flops(language, self.lengths.astype(np.float64))
        self._made: dict[tuple[int, int], _MicroBatches] = {}
        self._tables: dict[tuple[int, int, int], Numbers] = {}

    def deal(self, parallel: ParallelConfig, num_replicas: int) -> Deal:
        """Divide the samples among replicas, and each replica's samples among micro-batches.

        Args:
            parallel: The layout of a replica.
            num_replicas: R.

        Returns:
            The micro-batches of all replicas. With other numbers of replicas the same samples are in the step.
        """
        packed = self.train.batching is Batching.PACKED
        multiple, rows = 1, 1
        if packed:
            rounds = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
            multiple, rows = sample_multiple(parallel), max(num_replicas * rounds, 1)
        if (multiple, rows) not in self._made:
            self._made[multiple, rows] = self._packs(multiple, rows) if packed else self._alike()
        made, key = self._made[multiple, rows], (multiple, rows, num_replicas)
        if key not in self._tables:
            self._tables[key] = deal_evenly(made.costs, made.others, num_replicas)
        table = self._tables[key]
        padded = row_table(np.maximum(made.longest[table], 1), parallel, self.train)
        work = made.costs[table].sum(1)
        imbalance = float(work.max() / work.mean() - 1) if work.any() else 0.0
        balance = Balance(_padding(padded, made.size, int(self.lengths.sum())), imbalance)
        return Deal(made.samples, made.bounds, table, padded, packed, balance)

    def _packs(self, multiple: int, num_rows: int) -> _MicroBatches:
        """Pack the samples into a number of rows that `num_rows` divides; each row is a micro-batch."""
        taken = padded_sample_length(self.lengths, multiple)
        owner, count = row_numbers(taken, self.train.seq_length, num_rows)
        return _MicroBatches(
            samples=np.argsort(owner, kind="stable"),
            bounds=np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=count))]),
            size=1,
            costs=_sums(owner, self.cost, count),
            others=_sums(owner, self.encoder_costs, count),
            longest=_sums(owner, taken, count).astype(np.int64),
        )

    def _alike(self) -> _MicroBatches:
        """Put samples of like length into micro-batches."""
        size = self.train.micro_batch_size
        order = np.argsort(-self.lengths, kind="stable").reshape(-1, size)
        owner, count = np.empty(len(self.lengths), np.int64), len(order)
        owner[order] = np.arange(count)[:, None]
        return _MicroBatches(
            samples=np.sort(order, axis=1).ravel(),
            bounds=np.arange(count + 1) * size,
            size=size,
            costs=size * self.cost[order[:, 0]],
            others=_sums(owner, self.encoder_costs, count),
            longest=self.lengths[order[:, 0]],
        )


def deal(
    lengths: npt.NDArray[np.integer],
    encoder_costs: npt.NDArray[np.number],
    language: LanguageConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    num_replicas: int,
) -> Deal:
    """Divide a global batch among replicas, and each replica's samples among micro-batches.

    Args:
        lengths: int64 (N,), tokens of each sample, including visual tokens and after truncation.
        encoder_costs: (N,), what each sample costs the encoder, in any unit; see `encoder_costs_of`.
        language: The decoder, which determines what a length costs.
        parallel: The layout of a replica.
        train: Capacity of a row, size of a micro-batch, and whether samples are packed.
        num_replicas: R.

    Returns:
        The micro-batches of all replicas. With other numbers of replicas the same samples are in the step.
    """
    return Dealing(lengths, encoder_costs, language, train).deal(parallel, num_replicas)


def encoder_costs_of(
    model: ModelConfig, units: npt.NDArray[np.integer], views: npt.NDArray[np.integer] | None
) -> Costs:
    """Return what samples cost the encoder: their units, or the operations of their views where these differ.

    Args:
        model: The recipe's model.
        units: int64 (N,), units of each sample.
        views: int64 (I, 4), of views of any size the sample that has each, and its patches in time, height and width;
            None if all views have one size.

    Returns:
        float64 (N,). Attention is quadratic in the patches of a frame, so one large view costs more than several small
        ones of the same area.
    """
    if views is None:
        return units.astype(np.float64)
    shapes, which = np.unique(views[:, 1:], axis=0, return_inverse=True)
    costs = np.array([unit_flops(model, ViewGrid(*shape)) for shape in shapes.tolist()], np.float64)
    found: Costs = np.zeros(len(units))
    np.add.at(found, views[:, 0], costs[which.reshape(-1)])
    return found


def _sums(owner: npt.NDArray[np.int64], values: npt.NDArray[Any], count: int) -> Costs:
    """Return the sum of the values of each of `count` micro-batches."""
    return np.bincount(owner, values, count).astype(np.float64)


def deal_evenly(costs: Costs, others: Costs, num_replicas: int) -> Numbers:
    """Deal micro-batches to replicas, equally many to each.

    In each round every replica gets one of the R most costly micro-batches that are left: the one with the least work
    so far the most costly. Then the busiest replica and the idlest exchange micro-batches as long as that helps, first
    to even out the costs, and then the second costs where it makes no replica busier.

    Args:
        costs: float64, the cost of each micro-batch; their number is a multiple of R.
        others: float64, the second cost of each.
        num_replicas: R.

    Returns:
        int64 (R, micro-batches of each), the numbers of each replica's micro-batches, the most costly first.
    """
    order = np.lexsort([-others, -costs]).reshape(-1, num_replicas)
    work = np.zeros(num_replicas)
    table = np.zeros_like(order)
    for number, group in enumerate(order):
        idle_first = np.argsort(work, kind="stable")
        table[number, idle_first] = group
        work[idle_first] += costs[group]
    table = table.T.copy()
    if num_replicas > 1:
        _exchange(table, costs, costs, np.inf)
        _exchange(table, others, costs, 1 + _NEARLY_EQUAL)
    flat, owner = table.ravel(), np.repeat(np.arange(num_replicas), table.shape[1])
    return flat[np.lexsort([flat, -costs[flat], owner])].reshape(table.shape)


def _exchange(table: npt.NDArray[np.int64], costs: Costs, limited: Costs, limit: float) -> None:
    """Even out `costs` over the replicas of a table (R, micro-batches each), in place.

    No exchange makes a replica's sum of `limited` larger than the largest one is already, or than `limit` means.
    """
    cost, limit_of = costs[table], limited[table]
    work, kept = cost.sum(1), limit_of.sum(1)
    most = max(float(kept.max()), limit * float(kept.mean()))
    every, even = -(-table.shape[1] // _LOOKED_AT), _EVEN * float(work.mean())
    for _ in range(_EXCHANGES):
        busy, found = int(work.argmax()), False
        mine, mine_limited = cost[busy, ::every, None], limit_of[busy, ::every, None]
        for idle in _idlest(work):
            half = (work[busy] - work[idle]) / 2
            if half <= even:
                break
            gain = mine - cost[idle, ::every]
            left = np.abs(gain - half)
            moved = mine_limited - limit_of[idle, ::every]
            if most < np.inf:
                left[(kept[busy] - moved > most) | (kept[idle] + moved > most)] = np.inf
            one, two = divmod(int(left.argmin()), left.shape[1])
            if left[one, two] < half:
                for sums, change in ((work, gain[one, two]), (kept, moved[one, two])):
                    sums[busy] -= change
                    sums[idle] += change
                for array in (table, cost, limit_of):
                    here, there = (busy, one * every), (idle, two * every)
                    array[here], array[there] = array[there], array[here]
                found = True
                break
        if not found:
            return


def _idlest(work: Costs) -> Iterator[int]:
    """The replicas with least work, the idlest first; the others are only sorted if that one is not enough."""
    yield int(work.argmin())
    yield from np.argsort(work, kind="stable")[1:_PARTNERS].tolist()


def _padding(padded: Numbers, batch_size: int, tokens: int) -> float:
    """Return the share of positions that hold no sample, from the padded lengths of all micro-batches."""
    positions = batch_size * int(padded.sum())
    return 1 - tokens / positions if positions else 0.0
