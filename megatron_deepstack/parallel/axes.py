"""The parallel axes as arithmetic: which place a rank has on each.

Axes in rank order, fastest first: tp, cp, dp, pp (Megatron-Core's default `tp-cp-ep-dp-pp`). Neither torch nor Megatron
is needed for it, so a launcher can tell where ranks will stand before it has loaded either.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands on each axis."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True, slots=True)
class Axes:
    """Sizes of the parallel axes; arithmetic between ranks, places and replicas."""

    tp: int
    cp: int
    dp: int
    pp: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    def place(self, rank: int) -> Place:
        """Place of a global rank."""
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Place(tp=tp, cp=cp, dp=dp, pp=pp)

    def rank(self, place: Place) -> int:
        """Global rank of a place."""
        return place.tp + self.tp * (place.cp + self.cp * (place.dp + self.dp * place.pp))

    def replica_rank(self, *, tp: int, cp: int, pp: int) -> int:
        """Rank within a replica: ascending global ranks of one dp index."""
        return tp + self.tp * (cp + self.cp * pp)

    def replica_ranks(self, dp: int) -> list[int]:
        """Global ranks of replica `dp`, in replica order."""
        return [
            self.rank(Place(tp=tp, cp=cp, dp=dp, pp=pp))
            for pp in range(self.pp)
            for cp in range(self.cp)
            for tp in range(self.tp)
        ]


def axes_for(parallel: ParallelConfig, world_size: int) -> Axes:
    """Axes of `world_size` ranks under a layout; raises LayoutError if the ranks do not divide into replicas."""
    replica = parallel.tensor * parallel.context * parallel.pipeline
    if world_size % replica:
        raise LayoutError(
            [
                f"parallel: {world_size} ranks do not divide into replicas of {replica} (tensor {parallel.tensor} x "
                f"context {parallel.context} x pipeline {parallel.pipeline}); start {replica} ranks or a multiple"
            ]
        )
    return Axes(tp=parallel.tensor, cp=parallel.context, dp=world_size // replica, pp=parallel.pipeline)
