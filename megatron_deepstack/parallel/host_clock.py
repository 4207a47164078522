"""One time for all ranks: how far each rank's monotonic clock is from rank 0's.

Processes of one machine share the clock (`time.perf_counter_ns` is CLOCK_MONOTONIC on Linux), so nothing is estimated.
Otherwise all ranks meet at a barrier several times and read their clocks behind it: they leave it within its own
latency of each other, and the median over meetings is taken.
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
    """What to subtract from a rank's clock to get rank 0's."""

    ns: int
    spread_ns: int
    """Half the range of the estimates; 0 on one machine."""


def clock_offsets() -> list[Offset]:
    """The offset of each rank, in rank order. Collective over all ranks."""
    machines: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(machines, _BOOT_ID.read_text() if _BOOT_ID.exists() else None)
    if machines[0] is not None and len(set(machines)) == 1:
        return [Offset(0, 0)] * len(machines)
    return offsets_of(_meet())


def _meet() -> list[list[int]]:
    """Readings of every rank's clock, one behind each barrier."""
    readings = []
    for _ in range(_MEETINGS):
        dist.barrier()
        synchronize()
        readings.append(time.perf_counter_ns())
    gathered: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, readings)
    return gathered


def offsets_of(readings: Sequence[Sequence[int]]) -> list[Offset]:
    """Offsets from readings taken at the same moments: `readings[rank][meeting]`."""
    offsets = []
    for mine in readings:
        apart = [ours - first for ours, first in zip(mine, readings[0], strict=True)]
        offsets.append(Offset(ns=round(statistics.median(apart)), spread_ns=(max(apart) - min(apart)) // 2))
    return offsets
