"""Sums over ranks: the step's loss and token count, which exist on last stages only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.platform.compute.device import local_device


def sum_over_run(value: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Sum over pp, cp and dp of a tensor that is zero except on last stages; the same on every rank afterwards.

    Tensor-parallel ranks hold copies, so they are not summed. Collective over all ranks; in place, returns `value`.
    """
    dist.all_reduce(value, group=groups.decoder.pp)
    dist.all_reduce(value, group=groups.decoder.dp_cp)
    return value


def loss_and_tokens(losses: list[torch.Tensor], num_tokens: torch.Tensor, groups: Groups) -> tuple[float, int]:
    """Sum of token losses and number of targets of the whole step. Collective over all ranks; one read of the device.

    Args:
        losses: Sum of each micro-batch's token losses, on last stages; none elsewhere.
        num_tokens: Number of their targets, a whole number on the device; 0 elsewhere.
        groups: The run's groups.

    Returns:
        Both sums over the run, added in float64.
    """
    both = torch.zeros(2, dtype=torch.float64, device=local_device())
    for loss in losses:
        both[0] += loss.double()
    both[1] = num_tokens
    total, count = sum_over_run(both, groups).tolist()
    return total, int(count)


def share_from_last_stage(value: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Give every stage what the last one has; `value` is zero elsewhere. Collective over pp; in place."""
    dist.all_reduce(value, group=groups.decoder.pp)
    return value


def gather_last_dim(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(..., n) of each rank to (..., n * ranks), in rank order; no gradient. Collective over `group`."""
    shards = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, local.contiguous(), group=group)
    return torch.cat(shards, dim=-1)


def sum_over_replicas(values: Sequence[float]) -> list[float]:
    """Sum of numbers that every rank of a replica knows alike, over replicas. Collective over dp.

    Args:
        values: Counts or FLOPs of this replica. The FLOPs of a large step pass the range of 64-bit whole numbers, so
            all are summed as float64, which is exact for counts up to 2^53.

    Returns:
        The sums, in the same order.
    """
    totals = torch.tensor(values, dtype=torch.float64, device=local_device())
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
    return totals.tolist()


def sum_over_model(values: list[int], groups: Groups) -> list[int]:
    """Sum of numbers over the shards and stages of one model. Collective over tp and pp."""
    totals = torch.tensor(values, dtype=torch.int64, device=local_device())
    dist.all_reduce(totals, group=groups.decoder.mp)
    return totals.tolist()


def start_lowest_over_ranks(value: int) -> Callable[[], int]:
    """Begin to find the lowest of every rank's `value`, which the result waits for. Collective over all ranks."""
    lowest = torch.tensor([value], dtype=torch.int64, device=local_device())
    work = dist.all_reduce(lowest, op=dist.ReduceOp.MIN, async_op=True)

    def wait() -> int:
        if work is not None:
            work.wait()
        return int(lowest.item())

    return wait


def of_every_rank(text: str) -> list[str]:
    """Every rank's `text`, in rank order. Collective over all ranks; for rare, short messages."""
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


def from_first_rank(text: str) -> str:
    """Rank 0's `text`. Collective over all ranks."""
    texts = [text]
    dist.broadcast_object_list(texts, src=0, device=local_device())
    return texts[0]
