"""Context parallelism's zigzag order: which positions a cp rank holds, and gathering a sequence over cp.

A sequence is divided into 2 cp equal pieces. Rank i holds the pieces i and 2 cp - 1 - i, so that the work of causal
attention is the same on all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def zigzag(length: int, num_ranks: int, rank: int, device: torch.device | None = None) -> torch.Tensor:
    """Return the positions of a sequence that one cp rank holds.

    Args:
        length: Length of the whole sequence; a multiple of `2 * num_ranks` if there are several ranks.
        num_ranks: Size of the context-parallel axis.
        rank: Index on that axis.
        device: Device of the result; torch's default if None.

    Returns:
        int64 (length / num_ranks,): positions in the whole sequence, in the order in which the rank holds them.
    """
    if num_ranks == 1:
        return torch.arange(length, device=device)
    chunks = torch.arange(length, device=device).reshape(2 * num_ranks, -1)
    return torch.cat([chunks[rank], chunks[2 * num_ranks - 1 - rank]])


def local_positions(local_length: int, group: dist.ProcessGroup, device: torch.device) -> torch.Tensor:
    """Return the positions in the whole sequence that this rank holds. No communication takes place.

    Args:
        local_length: Number of positions that this rank holds.
        group: The context-parallel group.
        device: Device of the result.

    Returns:
        int64 (local_length,), in the order in which the rank holds the positions.
    """
    num_ranks = dist.get_world_size(group)
    return zigzag(local_length * num_ranks, num_ranks, dist.get_rank(group), device)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        num_ranks = dist.get_world_size(group)
        parts = [torch.empty_like(local) for _ in range(num_ranks)]
        dist.all_gather(parts, local.contiguous(), group=group)
        order = torch.cat([zigzag(local.shape[0] * num_ranks, num_ranks, r, local.device) for r in range(num_ranks)])
        ctx.group, ctx.order, ctx.length = group, order, local.shape[0]
        full = torch.empty_like(torch.cat(parts))
        full[order] = torch.cat(parts)
        return full

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        return total[ctx.order[rank * ctx.length : (rank + 1) * ctx.length]], None


def gather_sequence(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather a whole sequence on every cp rank. Collective over cp, in the forward and in the backward pass.

    Gradients flow: each rank gets the gradients of its own positions, summed over cp.

    Args:
        local: (S / cp, ...) this rank's positions, in zigzag order.
        group: The context-parallel group.

    Returns:
        (S, ...) in the order of the whole sequence, the same on every cp rank.
    """
    return _Gather.apply(local, group)  # type: ignore[no-any-return, no-untyped-call]
