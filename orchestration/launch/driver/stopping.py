"""Asking a run to end: a file in its folder, which rank 0 looks for each step and the driver twice a second."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_deepstack.platform.files.write_whole import write_whole
from orchestration.launch.driver.record import STOP_FILE, LaunchRecord, RunState


@contextmanager
def stop_signals(run_dir: Path, record: LaunchRecord) -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C ask the ranks to save and end, as long as the context lasts.

    Args:
        run_dir: The run's folder, where the request is left.
        record: The run's record, whose state becomes STOPPING.

    Yields:
        An event that the second signal sets.
    """
    second = threading.Event()

    def handle(number: int, frame: object) -> None:
        if record.state is RunState.STOPPING:
            second.set()
            return
        record.state = RunState.STOPPING
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
    """Ask for an end of the run.

    Args:
        run_dir: The run's folder, where the request is left for all ranks.
        reason: Who asks, and why.
        how: `save`: save first; `now`: end at once; `drain`: save, to go on without a node that is taken back.
    """
    write_whole(run_dir / STOP_FILE, json.dumps({"how": how, "reason": reason, "time": time.time()}) + "\n")


def is_asked(run_dir: Path) -> bool:
    """Whether an end was asked for. A folder that cannot be reached at present says no, and is asked again later."""
    return os.path.exists(run_dir / STOP_FILE)  # `Path.exists` raises what a shared folder may answer for a moment


def wants_it_now(run_dir: Path) -> bool:
    """Whether the run is to end without saving."""
    return _request(run_dir).get("how") == "now"


def is_for_a_node(run_dir: Path) -> bool:
    """Whether the request was made because Ray takes a node back: the run goes on elsewhere."""
    return _request(run_dir).get("how") == "drain"


def forget_request(run_dir: Path) -> None:
    """Take the request away."""
    (run_dir / STOP_FILE).unlink(missing_ok=True)


def _request(run_dir: Path) -> dict[str, Any]:
    try:
        found = json.loads((run_dir / STOP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
