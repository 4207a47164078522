"""Context parallelism's zigzag order: which positions a cp rank holds, and gathering a sequence over cp.

A sequence is divided into 2 cp equal pieces. Rank i holds the pieces i and 2 cp - 1 - i, so that the work of causal
attention is the same on all ranks. Of a pack, each sample is divided so by itself, and a rank holds its pieces of all
samples in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist


def pieces(ends: Sequence[int], num_ranks: int, rank: int) -> list[tuple[int, int]]:
    """Return the ranges of positions that one cp rank holds.

    Args:
        ends: Where the samples of a pack end, or the length of a sequence that is no pack. With several ranks each
            sample's length is a multiple of `2 * num_ranks`.
        num_ranks: Size of the context-parallel axis.
        rank: Index on that axis.

    Returns:
        (begin, end) of each range, in the order in which the rank holds them.
    """
    if num_ranks == 1:
        return [(0, ends[-1])]
    found = []
    for begin, end in pairwise((0, *ends)):
        size = (end - begin) // (2 * num_ranks)
        found += [(begin + k * size, begin + (k + 1) * size) for k in (rank, 2 * num_ranks - 1 - rank)]
    return found


def zigzag(ends: Sequence[int], num_ranks: int, rank: int) -> npt.NDArray[np.int64]:
    """Return the positions of a sequence that one cp rank holds.

    Args:
        ends: As for `pieces`.
        num_ranks: Size of the context-parallel axis.
        rank: Index on that axis.

    Returns:
        int64 (length / num_ranks,): positions in the whole sequence, in the order in which the rank holds them.
    """
    return np.concatenate([np.arange(begin, end) for begin, end in pieces(ends, num_ranks, rank)])


def own_part(whole: torch.Tensor, ends: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Select the positions that this rank holds. No communication takes place, and the host does not wait.

    Args:
        whole: (S, ...) by position of the whole sequence.
        ends: As for `pieces`.
        group: The context-parallel group.

    Returns:
        (S / cp, ...), in the order in which the rank holds the positions.
    """
    ranges = pieces(ends, dist.get_world_size(group), dist.get_rank(group))
    return torch.cat([whole[begin:end] for begin, end in ranges])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, ends: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
        num_ranks = dist.get_world_size(group)
        parts = [torch.empty_like(local) for _ in range(num_ranks)]
        dist.all_gather(parts, local.contiguous(), group=group)
        full = local.new_empty(ends[-1], *local.shape[1:])
        for rank, part in enumerate(parts):
            taken = 0
            for begin, end in pieces(ends, num_ranks, rank):
                full[begin:end] = part[taken : taken + end - begin]
                taken += end - begin
        ctx.group, ctx.ends = group, ends
        return full

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return own_part(total, ctx.ends, ctx.group), None, None


def gather_sequence(local: torch.Tensor, group: dist.ProcessGroup, ends: Sequence[int] | None = None) -> torch.Tensor:
    """Gather a whole sequence on every cp rank. Collective over cp, in the forward and in the backward pass.

    Gradients flow: each rank gets the gradients of its own positions, summed over cp.

    Args:
        local: (S / cp, ...) this rank's positions, in zigzag order.
        group: The context-parallel group.
        ends: As for `pieces`; None for a sequence that is no pack.

    Returns:
        (S, ...) in the order of the whole sequence, the same on every cp rank.
    """
    whole = (local.shape[0] * dist.get_world_size(group),)
    return _Gather.apply(local, whole if ends is None else ends, group)  # type: ignore[no-any-return, no-untyped-call]
