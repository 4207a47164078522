"""Identifying a process: the system uses process ids again, and after a restart soon the same low ones.

An id identifies a process only together with the start of its system (or container) and the time at which the process
began. Code that stores an id for other processes must store these two as well.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def machine_start() -> str:
    """Return a text that identifies the last start of this machine's system (or container)."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else os.uname().nodename
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def process_start(pid: int | None = None) -> float:
    """Return the time at which a process of this machine began, in seconds since 1970.

    Args:
        pid: Its id; this process if None.

    Raises:
        psutil.Error: There is no such process.
    """
    return psutil.Process(pid).create_time()


def still_runs(pid: int, since: float) -> bool:
    """Whether a process of this machine still runs, and its id was not given to another process.

    Args:
        pid: Its id.
        since: The time at which it began, as `process_start` returns it.

    Returns:
        True if the process exists and is not a zombie.
    """
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - since) < 1
    return False
