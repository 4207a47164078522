"""Identifying a process: the system uses process ids again, and after a restart soon the same low ones.

An id identifies a process only together with the start of its system (or container) and the moment at which the process
began. Code that stores an id for other processes must store these two as well. The moment is counted from the start of
the system: its date changes whenever the machine's clock is set, also for a process that runs.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_TICKS: Final = 19
"""Place of the start of a process among the fields of its `stat` file that follow its name."""


def machine_start() -> str:
    """Return a text that identifies the last start of this machine's system (or container)."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else os.uname().nodename
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def process_start(pid: int | None = None) -> float:
    """Return the date at which a process of this machine began, in seconds since 1970, by the clock as it is set now.

    Args:
        pid: Its id; this process if None.

    Raises:
        psutil.Error: There is no such process.
    """
    return psutil.Process(pid).create_time()


def process_ticks(pid: int | None = None) -> int:
    """Return how long after its system a process of this machine began, in the kernel's clock ticks.

    Args:
        pid: Its id; this process if None.

    Raises:
        OSError: There is no such process.
    """
    text = Path(f"/proc/{'self' if pid is None else pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(text.rpartition(")")[2].split()[_TICKS])  # the name in parentheses may hold spaces and parentheses


def still_runs(pid: int, ticks: int | None) -> bool:
    """Whether a process of this machine still runs, and its id was not given to another process.

    Args:
        pid: Its id.
        ticks: When it began, as `process_ticks` returns it; None, in records of earlier releases, stands for whatever
            process has the id now.

    Returns:
        True if the process exists and is not a zombie.
    """
    with suppress(psutil.Error, OSError):
        alive = psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        return alive and (ticks is None or process_ticks(pid) == ticks)
    return False
