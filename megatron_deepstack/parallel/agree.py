"""Agreement between all ranks: sums of small numbers over the whole run, and errors that all ranks raise together.

A rank that meets an expected error while the run starts cannot simply exit. The others would wait for it, and would end
with a broken connection instead of its message. So the start is divided into phases, and after each phase all ranks
tell each other whether they completed it.
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
    """Add up the numbers of all ranks, element by element, in float64. Collective over all ranks.

    Args:
        values: This rank's numbers; equally many on all ranks.

    Returns:
        The sums, in the same order, on every rank.
    """
    totals = torch.tensor(values, dtype=torch.float64, device=local_device())
    dist.all_reduce(totals)
    return totals.tolist()


def gather_over_ranks(value: float) -> list[float]:
    """Return the numbers of all ranks in rank order, on every rank, as float64. Collective over all ranks."""
    mine = [0.0] * dist.get_world_size()
    mine[dist.get_rank()] = value
    return sum_over_ranks(mine)


def any_over_ranks(flags: np.ndarray) -> np.ndarray:
    """Find out where any rank has True. Collective over all ranks.

    Args:
        flags: bool array; its shape is the same on all ranks.

    Returns:
        bool array of that shape, the same on every rank.
    """
    found = torch.from_numpy(flags.astype(np.uint8)).to(local_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.cpu().numpy().astype(bool)


@contextmanager
def phase() -> Iterator[None]:
    """A phase of the start, as a context manager that all ranks leave together. Collective over all ranks.

    The block may contain collectives only if no error can be raised before them on some ranks and not on others.

    Yields:
        Nothing. No rank leaves the block before every rank has reached its end.

    Raises:
        DeepStackError: The same error on every rank, if any rank met one in the block. It names the rank that met it.
    """
    problem: DeepStackError | None = None
    try:
        yield
    except DeepStackError as error:
        problem = error
    agree(problem)


def agree(problem: DeepStackError | None) -> None:
    """Tell all ranks which error this rank met, if any. Collective over all ranks.

    Args:
        problem: An expected error of this rank, or None.

    Raises:
        DeepStackError: The same error on every rank, if any rank met one; see `errors.agreed_error`.
    """
    everyone: list[tuple[str, DeepStackError] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, None if problem is None else (socket.gethostname(), problem))
    found = {rank: met for rank, met in enumerate(everyone) if met is not None}
    if found:
        raise agreed_error(found, len(everyone)) from problem
