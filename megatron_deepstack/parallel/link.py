"""A small all-reduce between two processes, to try the link between their machines before a run depends on it."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_deepstack.platform.compute.device import backend, select_device

_NUM_VALUES = 1 << 18


def try_link(rank: int, address: str, port: int, timeout_seconds: float) -> float:
    """All-reduce 1 MiB between rank 0 and rank 1, who meet in the store at `address`; returns its seconds.

    Joins and leaves a process group of its own, on the backend that training would take. Raises what torch raises where
    there is no way through, and ArithmeticError where the sum is wrong.
    """
    device = select_device()
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_seconds))
    dist.init_process_group(backend(), store=store, rank=rank, world_size=2, timeout=timedelta(seconds=timeout_seconds))
    try:
        values = torch.full((_NUM_VALUES,), float(rank + 1), device=device)
        dist.all_reduce(values)  # the first call opens the connections
        begin = time.perf_counter()
        dist.all_reduce(values)
        total = float(values.sum())
        seconds = time.perf_counter() - begin
    finally:
        dist.destroy_process_group()
    if total != 6.0 * _NUM_VALUES:
        raise ArithmeticError(f"two all-reduces of {_NUM_VALUES} values gave {total}, not {6.0 * _NUM_VALUES}")
    return seconds
