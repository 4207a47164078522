"""Waiting for a cluster to have room: nodes that join late, or come back after a failure."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from megatron_deepstack.errors import ClusterError, PreemptedError

Found = TypeVar("Found")

_POLL_SECONDS: Final = 0.5
_QUIET_SECONDS: Final = 5.0
"""The slots of the last attempt are free a moment after its end; nothing is said about so short a wait."""


def wait_for_seats(
    seats: Callable[[], Found],
    *,
    since: float,
    seconds: float,
    tell: Callable[[str], None],
    asked_to_stop: Callable[[], bool],
) -> Found:
    """Wait until the cluster has room for all ranks.

    Args:
        seats: Gives the seats, or raises ClusterError while something is missing.
        since: When the wait began, in seconds of time.monotonic.
        seconds: Longest wait from then on.
        tell: Receives what is missing and how long the wait may take, each time this changes.
        asked_to_stop: Whether somebody has asked to stop.

    Returns:
        What `seats` gave.

    Raises:
        ClusterError: Something was still missing after `seconds`.
        PreemptedError: Somebody has asked to stop.
    """
    said = ""
    while True:
        try:
            return seats()
        except ClusterError as error:
            waited = time.monotonic() - since
            if asked_to_stop():
                raise PreemptedError("stopped on request while waiting for nodes; nothing was running") from error
            if waited > seconds:
                raise ClusterError(
                    f"after {seconds:.0f} s (launch.start_seconds): {error}. Bring the nodes back, or ask for fewer "
                    "ranks; the same command goes on from the newest checkpoint"
                ) from error
            if waited > _QUIET_SECONDS and str(error) != said:
                said = str(error)
                tell(f"{said}; at most {seconds:.0f} s (launch.start_seconds)")
        time.sleep(_POLL_SECONDS)
