"""What all ranks must know alike before they decide: small numbers over the whole run, and errors of a phase.

A rank that meets an expected error while the run starts cannot simply leave: the others would wait for it, and end with
a broken connection in place of its message. So the start-up is cut into phases, and after each all ranks tell each
other whether they came through.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from megatron_deepstack.errors import DeepStackError, agreed_error
from megatron_deepstack.platform.compute.device import local_device


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


@contextmanager
def phase() -> Iterator[None]:
    """A phase of the start-up, which all ranks leave together. Collective over all ranks.

    The block may hold collectives only if no rank can raise before them what the others do not.

    Yields:
        Once; no rank comes behind the block before every rank has ended it.

    Raises:
        DeepStackError: The same on every rank, if any rank met one in the block. It names the rank that met it.
    """
    problem: DeepStackError | None = None
    try:
        yield
    except DeepStackError as error:
        problem = error
    agree(problem)


def agree(problem: DeepStackError | None) -> None:
    """Tell all ranks what this one met. Collective over all ranks.

    Args:
        problem: An expected error of this rank, or None.

    Raises:
        DeepStackError: On every rank, if any rank met one; see `errors.agreed_error`.
    """
    everyone: list[tuple[str, DeepStackError] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, None if problem is None else (socket.gethostname(), problem))
    found = {rank: met for rank, met in enumerate(everyone) if met is not None}
    if found:
        raise agreed_error(found, len(everyone)) from problem
