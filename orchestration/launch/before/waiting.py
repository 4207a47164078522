"""Waiting for a cluster to have room: nodes that join late, or come back after a failure."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from megatron_deepstack.errors import ClusterError, PreemptedError

Found = TypeVar("Found")

_POLL_SECONDS: Final = 0.5
_QUIET_SECONDS: Final = 5.0
"""What the last attempt held is free a moment after its end; a wait so short is not worth a word."""


def wait_for_seats(
    seats: Callable[[], Found],
    *,
    since: float,
    seconds: float,
    tell: Callable[[str], None],
    asked_to_stop: Callable[[], bool],
) -> Found:
    """What `seats` gives, once it raises ClusterError no more; `tell` hears what is missing, each time it changes,
    and how long the wait may take.

    `since` is the moment (of time.monotonic) that the wait began. Raises the ClusterError after `seconds`,
    PreemptedError if asked to stop, and at once any error that waiting does not remove.
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
