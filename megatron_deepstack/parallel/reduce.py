"""Sums and other reductions over ranks, such as the loss and the token count, which only last stages have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.platform.compute.device import local_device


def sum_over_run(value: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Sum a tensor over pp, cp and dp. Collective over all ranks.

    Tensor-parallel ranks hold equal copies, so they are not summed.

    Args:
        value: Any shape and dtype; zero on all stages except the last. It is changed in place.
        groups: The groups of the run.

    Returns:
        `value`, which is then the same on every rank.
    """
    dist.all_reduce(value, group=groups.decoder.pp)
    dist.all_reduce(value, group=groups.decoder.dp_cp)
    return value


def loss_and_tokens(
    losses: list[torch.Tensor], num_tokens: torch.Tensor, groups: Groups, own: torch.Tensor | None = None
) -> tuple[float, int, list[float]]:
    """Sum the losses and the targets of a whole step in float64. Collective over all ranks; reads the device once.

    Args:
        losses: Scalars: the sum of token losses of each of this rank's micro-batches; empty except on last stages.
        num_tokens: Scalar on the device: the number of targets of these micro-batches; 0 except on last stages.
        groups: The groups of the run.
        own: Numbers of which every rank has a part of its own, tensor-parallel ranks as well; of one shape on all.

    Returns:
        The sum of token losses, the number of targets, and the sums of `own`, line after line. All are the same on
        every rank.
    """
    sums = torch.zeros(2 + (0 if own is None else own.numel()), dtype=torch.float64, device=local_device())
    for loss in losses:
        sums[0] += loss.double()
    sums[1] = num_tokens
    if own is not None:
        sums[2:] = sum_over_group(own.double().reshape(-1), groups.decoder.tp)
    total, count, *more = sum_over_run(sums, groups).tolist()
    return total, int(count), more


def share_from_last_stage(value: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Give every stage the value of the last stage. Collective over pp.

    Args:
        value: Any shape and dtype; zero on all stages except the last. It is changed in place.
        groups: The groups of the run.

    Returns:
        `value`, which then has the last stage's content on every stage.
    """
    if groups.decoder.pp.size() > 1:
        dist.all_reduce(value, group=groups.decoder.pp)
    return value


def gather_last_dim(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate the tensors of all ranks along their last dimension. Collective over `group`; no gradient flows.

    Args:
        local: (..., n) this rank's tensor; shape and dtype are the same on all ranks.
        group: The ranks.

    Returns:
        (..., n * ranks), in rank order; `local` itself where it is the only one.
    """
    if group.size() == 1:
        return local
    shards = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, local.contiguous(), group=group)
    return torch.cat(shards, dim=-1)


def sum_over_group(value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum a tensor over the ranks of a group. Collective over the group; no gradient flows.

    Args:
        value: Any shape and dtype, the same on all ranks. It is changed in place.
        group: The ranks.

    Returns:
        `value`, which is then the same on every rank of the group.
    """
    if group.size() > 1:
        dist.all_reduce(value, group=group)
    return value


def sum_over_replicas(values: Sequence[float]) -> list[float]:
    """Sum numbers over replicas. Collective over dp; all ranks of a replica give the same numbers.

    Args:
        values: Counts or FLOPs of this replica. The FLOPs of a large step exceed the range of 64-bit whole numbers, so
            all values are summed as float64, which is exact for counts up to 2^53.

    Returns:
        The sums, in the same order.
    """
    totals = torch.tensor(values, dtype=torch.float64, device=local_device())
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
    return totals.tolist()


def sum_over_model(values: list[int], groups: Groups) -> list[int]:
    """Sum whole numbers over the ranks that hold the parts of one model. Collective over tp and pp.

    Args:
        values: This rank's numbers, summed as int64; equally many on all ranks.
        groups: The groups of the run.

    Returns:
        The sums, in the same order.
    """
    totals = torch.tensor(values, dtype=torch.int64, device=local_device())
    dist.all_reduce(totals, group=groups.decoder.mp)
    return totals.tolist()


def start_lowest_over_ranks(value: int) -> Callable[[], int]:
    """Start to find the lowest value of all ranks, without waiting for it. Collective over all ranks.

    Args:
        value: This rank's whole number, within 64 bits.

    Returns:
        A function that waits for the lowest value and returns it.
    """
    lowest = torch.tensor([value], dtype=torch.int64, device=local_device())
    work = dist.all_reduce(lowest, op=dist.ReduceOp.MIN, async_op=True)

    def wait() -> int:
        if work is not None:
            work.wait()
        return int(lowest.item())

    return wait


def of_every_rank(text: str) -> list[str]:
    """Return the texts of all ranks in rank order. Collective over all ranks; meant for rare and short messages."""
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


def from_first_rank(text: str) -> str:
    """Return the text of rank 0 on every rank. Collective over all ranks."""
    texts = [text]
    dist.broadcast_object_list(texts, src=0, device=local_device())
    return texts[0]
