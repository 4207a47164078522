"""The parallel axes as arithmetic: the index of each rank on each axis.

The axes are, from the one that changes fastest with the rank: tp, cp, dp, pp (Megatron-Core's default
`tp-cp-ep-dp-pp`). This module needs neither torch nor Megatron, so a launcher can compute the place of each rank before
it has loaded them.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Place:
    """The index of a rank on each axis, counted from 0."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True, slots=True)
class Axes:
    """The sizes of the parallel axes, and the arithmetic between ranks, places and replicas."""

    tp: int
    cp: int
    dp: int
    pp: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    def place(self, rank: int) -> Place:
        """Return the place of a global rank."""
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Place(tp=tp, cp=cp, dp=dp, pp=pp)

    def rank(self, place: Place) -> int:
        """Return the global rank of a place."""
        return place.tp + self.tp * (place.cp + self.cp * (place.dp + self.dp * place.pp))

    def replica_rank(self, *, tp: int, cp: int, pp: int) -> int:
        """Return the rank within a replica, which follows the order of the global ranks with one dp index.

        Args:
            tp: Index on the tensor-parallel axis.
            cp: Index on the context-parallel axis.
            pp: Index on the pipeline axis.

        Returns:
            The rank, from 0 to tp x cp x pp - 1.
        """
        return tp + self.tp * (cp + self.cp * pp)

    def replica_ranks(self, dp: int) -> list[int]:
        """Return the global ranks of the replica with index `dp`, in the order of the ranks within it."""
        return [
            self.rank(Place(tp=tp, cp=cp, dp=dp, pp=pp))
            for pp in range(self.pp)
            for cp in range(self.cp)
            for tp in range(self.tp)
        ]


def axes_for(parallel: ParallelConfig, world_size: int) -> Axes:
    """Return the axes of a number of ranks under a layout.

    Args:
        parallel: The recipe's layout.
        world_size: Number of all ranks.

    Returns:
        The axes; dp is the number of replicas.

    Raises:
        LayoutError: The ranks do not divide into whole replicas.
    """
    replica = parallel.tensor * parallel.context * parallel.pipeline
    if world_size % replica:
        raise LayoutError(
            [
                f"parallel: {world_size} ranks do not divide into replicas of {replica} (tensor {parallel.tensor} x "
                f"context {parallel.context} x pipeline {parallel.pipeline}); start {replica} ranks or a multiple"
            ]
        )
    if world_size // parallel.pipeline % parallel.expert:
        raise LayoutError(
            [
                f"parallel.expert: {parallel.expert} ranks share experts, and {world_size // parallel.pipeline} ranks "
                f"of a stage are no multiple of it; use a divisor, or start {parallel.expert * replica} ranks"
            ]
        )
    return Axes(tp=parallel.tensor, cp=parallel.context, dp=world_size // replica, pp=parallel.pipeline)
