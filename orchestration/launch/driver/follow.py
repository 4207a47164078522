"""Following a gang from the driver: what rank 0 prints, what happens to ranks, and the record for other shells."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from orchestration.launch.before.report import by_node
from orchestration.launch.driver.record import (
    HEARTBEAT_SECONDS,
    Events,
    LaunchRecord,
    RankPlace,
    Restart,
    RunState,
    Tail,
    rank_log,
    write_record,
)


def _event(line: str) -> dict[str, Any] | None:
    """An event from its line; None for a line that a full disk has cut off."""
    with suppress(ValueError):
        found = json.loads(line)
        return found if isinstance(found, dict) and "event" in found else None
    return None


class Follower:
    """Turns events into the record, and passes on the lines of rank 0."""

    def __init__(self, run_dir: Path, record: LaunchRecord) -> None:
        self._run_dir, self._record = run_dir, record
        self._events = Tail(Events(run_dir).path, from_start=True)
        self._log = Tail(rank_log(run_dir, 0), from_start=False)
        self._console = Console(highlight=False, soft_wrap=True)
        self._written = 0.0

    def look(self) -> None:
        """Pass on what is new."""
        events = [event for line in self._events.lines() if (event := _event(line)) is not None]
        for line in self._log.lines():
            self.say(line)
        for event in events:
            self._take(event)
        if events or time.monotonic() - self._written > HEARTBEAT_SECONDS:
            self._written = time.monotonic()
            with suppress(OSError):  # a full disk ends no run; at the run's end it is told
                write_record(self._run_dir, self._record)

    def say(self, line: str) -> None:
        """A line for the user."""
        self._console.print(Text(line))

    def _take(self, event: dict[str, Any]) -> None:
        record = self._record
        match event["event"]:
            case "start":
                record.attempt += 1
            case "waiting":
                record.waiting_for = event["what"]
                self.say(f"launch: waiting: {event['what']}")
            case "ranks":
                record.ranks = [RankPlace(**one) for one in event["ranks"]]
                record.waiting_for = ""
            case "running":
                record.state = RunState.RUNNING if record.state is not RunState.STOPPING else record.state
                self.say(f"launch: attempt {record.attempt}, rank {by_node(record.ranks)}")
            case "failure":
                self.note_restart(event["time"], event["reason"], event["ranks"])
                self.say(
                    f"launch: {event['reason']}. Restart {len(record.restarts)} of at most {record.max_failures}, from "
                    "the newest whole checkpoint"
                )

    def note_restart(self, moment: float, reason: str, ranks: Sequence[int]) -> None:
        """Record that the gang starts again.

        Args:
            moment: When it failed, in seconds since 1970.
            reason: Why, in one line.
            ranks: The ranks that caused it.
        """
        self._record.restarts.append(Restart(moment, reason, tuple(ranks)))
        if self._record.state is not RunState.STOPPING:
            self._record.state = RunState.RESTARTING
