"""Asking a run to end: a file in its folder, which rank 0 looks for each step and the driver twice a second."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestration.launch.record import STOP_FILE, LaunchRecord, State, write_whole


@contextmanager
def stop_signals(run_dir: Path, record: LaunchRecord) -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C ask the ranks to save and end; the second one sets the event."""
    second = threading.Event()

    def handle(number: int, frame: object) -> None:
        if record.state is State.STOPPING:
            second.set()
            return
        record.state = State.STOPPING
        request_stop(run_dir, f"the driver got {signal.Signals(number).name}")

    if threading.current_thread() is not threading.main_thread():
        yield second
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield second
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def request_stop(run_dir: Path, reason: str, *, how: str = "save") -> None:
    """Ask for an end of the run: `save` first, or `now`."""
    write_whole(run_dir / STOP_FILE, json.dumps({"how": how, "reason": reason, "time": time.time()}) + "\n")


def wants_it_now(run_dir: Path) -> bool:
    """Whether the run is to end without saving."""
    try:
        return bool(json.loads((run_dir / STOP_FILE).read_text(encoding="utf-8"))["how"] == "now")
    except (OSError, ValueError, KeyError, TypeError):
        return False
