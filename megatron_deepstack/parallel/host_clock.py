"""A common time for all ranks: the difference between each rank's monotonic clock and that of rank 0.

Processes of one machine share the clock (`time.perf_counter_ns` is CLOCK_MONOTONIC on Linux), so their difference is 0.
Otherwise all ranks pass a barrier several times and read their clocks after it. They leave the barrier at about the
same time, within its latency, and the median of the differences is taken.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_deepstack.platform.compute.device import synchronize

_MEETINGS = 9
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Offset:
    """The number of nanoseconds to subtract from a rank's clock to get the clock of rank 0."""

    ns: int
    spread_ns: int
    """Half the range of the estimates, in nanoseconds; 0 on one machine."""


def clock_offsets() -> list[Offset]:
    """Measure the offset of each rank's clock. Collective over all ranks.

    Returns:
        The offsets in rank order, the same on every rank.
    """
    machines: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(machines, _BOOT_ID.read_text() if _BOOT_ID.exists() else None)
    if machines[0] is not None and len(set(machines)) == 1:
        return [Offset(0, 0)] * len(machines)
    return offsets_of(_meet())


def _meet() -> list[list[int]]:
    """Read every rank's clock after each of several barriers; the result is `readings[rank][barrier]`."""
    readings = []
    for _ in range(_MEETINGS):
        dist.barrier()
        synchronize()
        readings.append(time.perf_counter_ns())
    gathered: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, readings)
    return gathered


def offsets_of(readings: Sequence[Sequence[int]]) -> list[Offset]:
    """Compute offsets from clock readings.

    Args:
        readings: Nanoseconds, as `readings[rank][moment]`. All ranks have read their clock at the same moments.

    Returns:
        The offset of each rank, in rank order.
    """
    offsets = []
    for mine in readings:
        apart = [ours - first for ours, first in zip(mine, readings[0], strict=True)]
        offsets.append(Offset(ns=round(statistics.median(apart)), spread_ns=(max(apart) - min(apart)) // 2))
    return offsets
