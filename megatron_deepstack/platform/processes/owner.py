"""The owner of something that only one process at a time may hold: a run folder, or a store that is being written.

The owner writes an `Owner` into a small file in the folder that it holds, and touches the file every few seconds. By
this file the next process decides whether the owner still lives. On the same machine it looks for the owner's process.
From another machine it watches whether the file changes, so the clocks of the machines need not agree.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Final

from megatron_deepstack.platform.processes.process import machine_start, process_start, process_ticks, still_runs

BEAT_SECONDS: Final = 5.0
"""Time between two signs of life of an owner."""
PATIENCE_SECONDS: Final = 30.0
"""An owner on another machine that gives no sign of life for this time counts as gone."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that holds something."""

    host: str
    """Name of its machine."""
    machine: str
    """`machine_start` on its machine; process ids are only valid together with it."""
    pid: int
    """Its process id."""
    started: float
    """When the process began, in seconds since 1970, for messages."""
    token: str
    """Random text that is new each time something is held."""
    beat: int = 0
    """Number of times that the record was rewritten."""
    what: str = ""
    """What the process is, such as `train`."""
    ticks: int | None = None
    """`process_ticks` of the process, which tells it from a later one with the same id; None in records of earlier
    releases."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def since(self) -> str:
        """When its process began, as text for messages, in this machine's time zone."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))


def this_process(what: str = "") -> Owner:
    """Make an owner for this process, with a new token.

    Args:
        what: What the process is, for messages.

    Returns:
        The owner.
    """
    return Owner(
        host=os.uname().nodename,
        machine=machine_start(),
        pid=os.getpid(),
        started=process_start(),
        token=uuid.uuid4().hex,
        what=what,
        ticks=process_ticks(),
    )


def owner_in(record: str | bytes) -> Owner | None:
    """Read an owner from its record. Fields that a later release has added are passed over.

    Args:
        record: The owner's fields as JSON.

    Returns:
        The owner; None if the text is no such record.
    """
    try:
        raw = json.loads(record)
        return Owner(**{item.name: raw[item.name] for item in fields(Owner) if item.name in raw})
    except (ValueError, TypeError):
        return None


def is_here(owner: Owner) -> bool:
    """Whether the process id of an owner is valid on this machine.

    Args:
        owner: An owner that was read from a file.

    Returns:
        True if its process was started since the last start of this machine's system or container.
    """
    return owner.machine == machine_start()


def lives(
    owner: Owner,
    seen: object,
    look: Callable[[], object | None],
    *,
    patience_seconds: float,
    beat_seconds: float,
) -> bool:
    """Whether an owner still lives. This takes up to `patience_seconds` if it is on another machine.

    Args:
        owner: The owner as it was read from its file.
        seen: What `look` returned when the file was read.
        look: Returns the present state of the owner's file, or None if the owner has removed it.
        patience_seconds: Longest time between two signs of life of a living owner.
        beat_seconds: Usual time between two signs of life.

    Returns:
        True if its process runs on this machine, or, for another machine, if the state of its file changes.
    """
    if is_here(owner):
        return still_runs(owner.pid, owner.ticks)
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        time.sleep(beat_seconds / 2)
        now = look()
        if now != seen:
            return now is not None
    return False
