"""What all ranks must know alike before they decide: small numbers, summed or gathered over the whole run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_deepstack.platform.device import local_device


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Sum of every rank's numbers, float64. Collective over all ranks."""
    totals = torch.tensor(values, dtype=torch.float64, device=local_device())
    dist.all_reduce(totals)
    return totals.tolist()


def gather_over_ranks(value: float) -> list[float]:
    """Every rank's number, in rank order, on every rank. Collective over all ranks."""
    mine = [0.0] * dist.get_world_size()
    mine[dist.get_rank()] = value
    return sum_over_ranks(mine)


def any_over_ranks(flags: np.ndarray) -> np.ndarray:
    """bool of the shape given: where any rank has True. Collective over all ranks, with one shape on all."""
    found = torch.from_numpy(flags.astype(np.uint8)).to(local_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.cpu().numpy().astype(bool)
