"""Who holds something that one process at a time may hold: a run folder, or a store that is being written.

An `Owner` is written into a small file beside what is held, and its file is touched every few seconds. Whoever comes
next judges by it whether the holder still lives: on the same machine by its process, from elsewhere by watching whether
the file changes, so that clocks need not agree.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from megatron_deepstack.platform.processes.process import machine_start, process_start, still_runs

BEAT_SECONDS: Final = 5.0
"""Between two signs of life of an owner."""
PATIENCE_SECONDS: Final = 30.0
"""An owner on another machine that gives no sign of life for so long is gone."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that holds something."""

    host: str
    machine: str
    """`machine_start` there; process ids mean something within it only."""
    pid: int
    started: float
    """When the process began, in seconds since 1970, so that another of the same id is not taken for it."""
    token: str
    """Of this holding alone."""
    beat: int = 0
    """Times it has been rewritten."""
    what: str = ""
    """What the process is, such as `train`."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def since(self) -> str:
        """When its process began, for messages, in this machine's time zone."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))


def this_process(what: str = "") -> Owner:
    """An owner of this process, with a token of its own.

    Args:
        what: What the process is, for messages.

    Returns:
        The owner.
    """
    return Owner(os.uname().nodename, machine_start(), os.getpid(), process_start(), uuid.uuid4().hex, what=what)


def is_here(owner: Owner) -> bool:
    """Whether an owner's process id means something on this machine.

    Args:
        owner: Read from a file.

    Returns:
        True if it began within the same start of this machine's system or container.
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
    """Whether an owner is still at work; takes up to `patience_seconds` if it is on another machine.

    Args:
        owner: As read from its file.
        seen: What `look` returned when it was read.
        look: What is to be seen of the owner now; None once it has given back what it held.
        patience_seconds: Longest silence of a living owner.
        beat_seconds: Between two signs of life.

    Returns:
        True if its process runs here, or if what `look` returns changes elsewhere.
    """
    if is_here(owner):
        return still_runs(owner.pid, owner.started)
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        time.sleep(beat_seconds / 2)
        now = look()
        if now != seen:
            return now is not None
    return False
