"""Making a process end when the process that started it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent dies for any reason.

    The kernel looks at later deaths only. A process spends seconds importing before it can call this; a parent that
    has died meanwhile is found out here, and this process then ends at once, in silence, as the kernel would end it.
    On systems other than Linux only such an earlier death is noticed.

    Args:
        parent: Process id of the parent, as the parent itself gave it; asking for it here would come too late.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
