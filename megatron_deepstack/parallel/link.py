"""A small all-reduce between two processes, to test the link between their machines before a run depends on it."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_deepstack.platform.compute.device import backend, select_device

_NUM_VALUES = 1 << 18


def try_link(rank: int, address: str, port: int, timeout_seconds: float) -> float:
    """Measure an all-reduce of 1 MiB between two processes. Both must call it, in no other process group.

    The two processes form a process group for this call, with the backend that training would use.

    Args:
        rank: 0 in one of the two processes, 1 in the other.
        address: Host of a `TCPStore` server that both processes can reach.
        port: Its port.
        timeout_seconds: Longest wait for the server and for the other process.

    Returns:
        Seconds of the second all-reduce; the first one opens the connections.

    Raises:
        RuntimeError: torch found no connection; its subclass torch.distributed.DistError included.
        ArithmeticError: The sum is wrong.
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
