"""Context parallelism's zigzag order: which positions a cp rank holds, and gathering a sequence over cp.

Of 2 cp equal chunks of the sequence, rank i holds chunks i and 2 cp - 1 - i, which balances causal attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def zigzag(length: int, num_ranks: int, rank: int, device: torch.device | None = None) -> torch.Tensor:
    """Global positions (length / num_ranks,) that `rank` holds of a sequence of `length`, in its local order."""
    if num_ranks == 1:
        return torch.arange(length, device=device)
    chunks = torch.arange(length, device=device).reshape(2 * num_ranks, -1)
    return torch.cat([chunks[rank], chunks[2 * num_ranks - 1 - rank]])


def local_positions(local_length: int, group: dist.ProcessGroup, device: torch.device) -> torch.Tensor:
    """Global positions of this rank's `local_length` positions."""
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
    """(S, ...) of this cp rank -> (S * cp, ...) in global order; gradients are summed over cp. Collective over cp."""
    return _Gather.apply(local, group)  # type: ignore[no-any-return, no-untyped-call]
