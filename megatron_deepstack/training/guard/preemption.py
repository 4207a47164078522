"""Being asked to stop: SIGTERM (a scheduler that takes the machine back) or Ctrl-C.

The signal only leaves a note. The loop reads it once a step, all ranks decide together, save, and raise PreemptedError.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def never() -> bool:
    """Nobody else asks."""
    return False


class StopRequest:
    """Whether this rank has been asked to stop. A context manager: within it the signals do not end the process."""

    def __init__(self, also: Callable[[], bool] = never) -> None:
        """`also` is asked once a step, for launchers that have other means than signals."""
        self._also, self._noted = also, False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether a signal came or the launcher asks to stop."""
        return self._noted or self._also()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
