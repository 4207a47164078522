"""The cores of this machine that one rank may keep busy while all ranks beside it do the same."""

from __future__ import annotations

import os


def cores_of_rank() -> int:
    """Return this rank's share of the cores that its process may use; at least 1.

    LOCAL_WORLD_SIZE, which torchrun and our launchers set, says how many ranks share the machine.
    """
    ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return max(len(os.sched_getaffinity(0)) // ranks, 1)
