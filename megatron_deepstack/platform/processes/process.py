"""Which process a number means: the system gives process ids out again, after a restart the same low ones.

An id names a process only together with the start of the system (or container) that it belongs to and the moment at
which the process began. Whoever writes an id down for others writes these too.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def machine_start() -> str:
    """Names one start of this machine's system (or container): process ids mean something within it only."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else os.uname().nodename
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def process_start(pid: int | None = None) -> float:
    """When a process of this machine began, this one by default; raises psutil.Error if there is none."""
    return psutil.Process(pid).create_time()


def still_runs(pid: int, since: float) -> bool:
    """Whether the process of this machine that began at `since` is there, and not another one of its number."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - since) < 1
    return False
