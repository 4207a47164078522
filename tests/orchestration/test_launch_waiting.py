"""Waiting for nodes."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from megatron_deepstack.errors import (
    ClusterError,
    LayoutError,
    PreemptedError,
)
from orchestration.launch.before.waiting import wait_for_seats


class TestWaiting:
    def wait(
        self, look: Callable[[], str], seconds: float = 60.0, since: float | None = None, asked: bool = False
    ) -> tuple[str, list[str]]:
        told: list[str] = []
        since = time.monotonic() if since is None else since
        found = wait_for_seats(look, since=since, seconds=seconds, tell=told.append, asked_to_stop=lambda: asked)
        return found, told

    def test_nodes_that_come_late(self) -> None:
        """What is missing is told once for each thing, and not within the first moments."""
        missing = iter(["two", "two", "one"])

        def look() -> str:
            for what in missing:
                raise ClusterError(what)
            return "seats"

        assert self.wait(look, since=time.monotonic() - 30) == (
            "seats",
            ["two; at most 60 s (launch.start_seconds)", "one; at most 60 s (launch.start_seconds)"],
        )

    def missing(self) -> str:
        raise ClusterError("2 are missing")

    def test_nodes_that_never_come(self) -> None:
        with pytest.raises(ClusterError, match=r"after 3 s \(launch.start_seconds\): 2 are missing. Bring the nodes"):
            self.wait(self.missing, seconds=3, since=time.monotonic() - 4)

    def test_a_stop_ends_the_wait(self) -> None:
        with pytest.raises(PreemptedError, match="while waiting for nodes"):
            self.wait(self.missing, asked=True)

    def test_a_layout_that_never_fits_is_told_at_once(self) -> None:
        def look() -> str:
            raise LayoutError(["parallel.tensor: too large"])

        with pytest.raises(LayoutError):
            self.wait(look)
