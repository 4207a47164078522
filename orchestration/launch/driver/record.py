"""What a run says about itself to other shells: `RUN/launch.json`, its events, its ranks' logs, and a request to stop.

`launch.json` is written by the driver alone, whole or not at all, every few seconds, so its age shows whether the
driver is alive. What happens to the gang is known in Ray's controller first, which appends it to `launch/events.jsonl`;
the driver reads it from there.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.platform.files.age import age_seconds
from megatron_deepstack.platform.files.write_whole import write_whole
from megatron_deepstack.platform.processes.process import machine_start, process_start, process_ticks, still_runs

STOP_FILE: Final = "stop.request"
_BLOCK_BYTES: Final = 1 << 16
HEARTBEAT_SECONDS: Final = 5.0
STALE_SECONDS: Final = 60.0
"""A driver that has not written for so long is gone; a shared folder may be some seconds behind."""


class RunState(StrEnum):
    """What a launched run is doing, or how it ended."""

    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self in (RunState.FINISHED, RunState.STOPPED, RunState.FAILED)


@dataclass(frozen=True, slots=True)
class RankPlace:
    """A rank of the present attempt."""

    rank: int
    host: str
    address: str
    pid: int


@dataclass(frozen=True, slots=True)
class Restart:
    """A failure, and what was done about it."""

    time: float
    reason: str
    ranks: tuple[int, ...]


@dataclass(kw_only=True, slots=True)
class LaunchRecord:
    """The content of `launch.json`."""

    state: RunState = RunState.STARTING
    started: float = field(default_factory=time.time)
    host: str = field(default_factory=socket.gethostname)
    machine: str = field(default_factory=machine_start)
    """Names one start of the driver's system or container; a host of the same name may be another."""
    pid: int = field(default_factory=os.getpid)
    pid_since: float = field(default_factory=process_start)
    """When its process began, in seconds since 1970, for people."""
    pid_ticks: int | None = field(default_factory=process_ticks)
    """The same by the kernel's clock, so that another process of the same id is not taken for it; None in records of
    earlier releases."""
    cluster: str = ""
    """Address of the Ray cluster; empty for one of its own."""
    num_ranks: int = 0
    max_failures: int = 0
    attempt: int = 0
    ranks: list[RankPlace] = field(default_factory=list)
    restarts: list[Restart] = field(default_factory=list)
    waiting_for: str = ""
    """What the next attempt lacks."""
    outcome: str = ""
    exit_code: int | None = None

    @property
    def is_here(self) -> bool:
        """Whether the driver's process id means something to this process."""
        return self.machine == machine_start()


def write_record(run_dir: Path, record: LaunchRecord) -> None:
    """Replace `launch.json`.

    Args:
        run_dir: The run's folder.
        record: The new content.
    """
    write_whole(RunFolder(run_dir).launch_record, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")


def read_record(run_dir: Path) -> LaunchRecord | None:
    """The run's record, if it was launched; raises ConfigError where the file is not one."""
    path = RunFolder(run_dir).launch_record
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["state"] = RunState(raw["state"])
        raw["ranks"] = [RankPlace(**one) for one in raw["ranks"]]
        raw["restarts"] = [Restart(**{**one, "ranks": tuple(one["ranks"])}) for one in raw["restarts"]]
        known = {item.name: raw[item.name] for item in fields(LaunchRecord) if item.name in raw}
        return LaunchRecord(**{"machine": "", "pid_ticks": None, **known})  # of an earlier version: judged by its age
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"{path}: not a record of `launch` ({error}); remove it"]) from error


def is_lost(run_dir: Path, record: LaunchRecord) -> bool:
    """Whether the driver has ended without recording how.

    Args:
        run_dir: The run's folder.
        record: The record that was read there.

    Returns:
        True if its process is gone; of another machine, if it has not written the record for `STALE_SECONDS`.
    """
    if record.state.over:
        return False
    if record.is_here:
        return not still_runs(record.pid, record.pid_ticks)
    with suppress(OSError):
        return age_seconds(RunFolder(run_dir).launch_record) > STALE_SECONDS
    return False


class Events:
    """The file that the controller appends to."""

    def __init__(self, run_dir: Path) -> None:
        self.path = RunFolder(run_dir).launch_events
        self._torn = False
        """Whether the last line may have no end, since the disk refused a part of it."""

    def clear(self) -> None:
        """Forget an earlier launch."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("", encoding="utf-8")

    def add(self, kind: str, **facts: Any) -> None:
        """Append an event. One that the disk refuses is lost: whoever follows the run misses it, and the run goes on.

        Args:
            kind: What has happened.
            **facts: Further values of the line, which JSON can hold.
        """
        line = json.dumps({"event": kind, "time": time.time(), **facts}) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + line if self._torn else line)
            self._torn = False
        except OSError:
            self._torn = True


def rank_log(run_dir: Path, rank: int) -> Path:
    """The file of what a rank prints; its standard error lies beside it as `.err`.

    Args:
        run_dir: The run's folder.
        rank: Number of the rank, from 0.

    Returns:
        The path, whether the file exists or not.
    """
    return RunFolder(run_dir).log(rank)


def newest_step(run_dir: Path) -> int | None:
    """Step of the newest checkpoint folder, which resuming may yet find damaged."""
    names = (path.name.removeprefix("step_") for path in RunFolder(run_dir).checkpoints.glob("step_*"))
    return max((int(name) for name in names if name.isdecimal()), default=None)


class Tail:
    """New whole lines of a file that grows, or that does not exist yet."""

    def __init__(self, path: Path, *, from_start: bool) -> None:
        self._path = path
        self._position, self._rest = 0, b""
        if not from_start:
            with suppress(OSError):
                self._position = path.stat().st_size

    def lines(self) -> list[str]:
        """Lines that were finished since the last call; none while the file cannot be read, and later all of them."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                new = file.read()
        except OSError:
            return []
        self._position += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole]


def last_lines(path: Path, number: int) -> list[str]:
    """The end of a log, of which no more is read than it takes.

    Args:
        path: The file.
        number: How many lines at most; empty lines do not count.

    Returns:
        The lines, none if the file cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            for taken in (_BLOCK_BYTES << doubled for doubled in count()):
                begin = max(0, size - taken)
                file.seek(begin)
                lines = file.read().decode("utf-8", "replace").splitlines()
                found = [line for line in lines[1 if begin else 0 :] if line.strip()]
                if not begin or len(found) >= number:
                    return found[-number:]
    except OSError:
        pass
    return []
