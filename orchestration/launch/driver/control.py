"""`status` and `stop`: a run seen and ended from another shell, by the files in its folder alone.

Neither needs Ray or the machine that the driver runs on; the run folder is shared by all nodes of a run.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.errors import ClusterError, ConfigError
from megatron_deepstack.platform.files.age import age_seconds
from megatron_deepstack.platform.files.run_lock import OWNER_FILE, read_owner
from megatron_deepstack.platform.files.strict_json import from_line
from megatron_deepstack.platform.processes.owner import Owner, is_here
from megatron_deepstack.platform.processes.process import still_runs
from megatron_deepstack.run_folder.recipe import in_the_run, run_around
from megatron_deepstack.training.guard.heartbeat import read_beats
from megatron_deepstack.training.guard.node_board import Beat
from orchestration.launch.driver.record import (
    STALE_SECONDS,
    LaunchRecord,
    RunState,
    is_lost,
    last_lines,
    newest_step,
    read_record,
)
from orchestration.launch.driver.stopping import request_stop

_LOOK_SECONDS = 0.5
_RECENT = 20


@dataclass(frozen=True, slots=True)
class Status:
    """A run, as far as its folder tells."""

    run_dir: Path
    state: str
    record: LaunchRecord | None
    """None if the run was not started by `launch`, or if something else has started it since."""
    num_steps: int
    recent: tuple[dict[str, Any], ...]
    """Metrics of the last steps."""
    checkpoint: int | None
    """Step of the newest checkpoint."""
    launcher: str = "launch"
    """What has started the run last, as far as known: `launch`, `train` or `torchrun`."""
    owner: Owner | None = None
    """Who works in the run folder now."""
    beats: Mapping[int, Beat] = field(default_factory=dict)
    """What each rank last said, by rank."""

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the median speed of the last ones; only of a run that goes on."""
        if not self.recent or self.state != RunState.RUNNING:
            return None
        return (self.num_steps - self.recent[-1]["step"]) * median(one["step_seconds"] for one in self.recent)

    @property
    def exit_code(self) -> int:
        """0 while it runs and when it has finished; the run's own code when it has failed or stopped."""
        if self.state == "lost":
            return 1
        return (self.record.exit_code if self.record is not None else None) or 0


def status_of(run_dir: Path) -> Status:
    """Read a run's folder; raises ConfigError where there is no run."""
    recipe = RunFolder(run_dir).recipe
    _require_run(run_dir)
    record, owner = _launched(run_dir)
    num_steps, recent = _num_steps(recipe), _recent(run_dir)
    if record is not None:
        state, launcher = "lost" if is_lost(run_dir, record) else str(record.state), "launch"
    else:
        launcher = owner.what if owner is not None else "train or torchrun"
        state = _state_without_record(run_dir, owner, recent, num_steps)
    beats = read_beats(run_dir)
    return Status(run_dir, state, record, num_steps, recent, newest_step(run_dir), launcher, owner, beats)


def _require_run(run_dir: Path) -> None:
    """Raise ConfigError where there is no run; one that is just starting is known by its owner alone."""
    folder = RunFolder(run_dir)
    if folder.launch_record.is_file() or (run_dir / OWNER_FILE).is_file():
        return
    if (above := run_around(run_dir)) is not None:
        raise ConfigError([f"{run_dir}: {in_the_run(above)}"])
    if not folder.recipe.is_file():
        raise ConfigError([f"{run_dir}: no run is there (neither launch.json nor recipe.yaml); expected a run_dir"])


def _launched(run_dir: Path) -> tuple[LaunchRecord | None, Owner | None]:
    """The record of `launch`, None where none is or something else has trained since; and who works there now."""
    record, owner = read_record(run_dir), read_owner(run_dir / OWNER_FILE)
    if record is None or (owner is not None and owner.what != "launch"):
        return None, owner
    return None if owner is None and _is_superseded(run_dir, record) else record, owner


def _is_superseded(run_dir: Path, record: LaunchRecord) -> bool:
    """Whether `train` or torchrun has worked in the folder after `launch`, and has given it back.

    Whatever trains writes the recipe as it starts; `launch` writes its record after that, all the time and at its end.
    """
    folder = RunFolder(run_dir)
    with suppress(OSError):
        later = folder.recipe.stat().st_mtime - folder.launch_record.stat().st_mtime
        return later > (0.0 if record.state.over else STALE_SECONDS)
    return False


def _state_without_record(
    run_dir: Path, owner: Owner | None, recent: Sequence[Mapping[str, Any]], num_steps: int
) -> str:
    """What a run of `train` or torchrun is doing: they give the folder back at their end, whatever end it is."""
    if owner is not None:
        if is_here(owner):
            if not still_runs(owner.pid, owner.ticks):
                return "lost"
            return "running" if RunFolder(run_dir).recipe.is_file() else "starting"
        with suppress(OSError):
            return "running" if age_seconds(run_dir / OWNER_FILE) < STALE_SECONDS else "lost"
    return "finished" if recent and recent[-1]["step"] >= num_steps else "not running"


def stop(run_dir: Path, *, now: bool, wait_seconds: float) -> str:
    """Ask a run to save and end, and wait until it has ended.

    Args:
        run_dir: The run's folder.
        now: End at once, without saving.
        wait_seconds: Longest wait for the end.

    Returns:
        What became of the run, in one line.

    Raises:
        ConfigError: Nothing runs here that `launch` has started.
        ClusterError: The run has not ended in time.
    """
    _require_run(run_dir)
    record, owner = _launched(run_dir)
    if record is None and owner is not None and is_here(owner) and not still_runs(owner.pid, owner.ticks):
        return f"nothing to stop: its {owner.what} ({owner}) is gone"
    if record is None:
        who = f"`kill {owner.pid}` on {owner.host}" if owner is not None else "send SIGTERM to its `train` process"
        raise ConfigError([f"{run_dir}: not started by `launch`; {who} to stop it, it saves first"])
    if record.state.over:
        return f"nothing to stop: {record.state}, {record.outcome}"
    if is_lost(run_dir, record):
        return f"nothing to stop: its driver (pid {record.pid} on {record.host}) is gone"
    request_stop(run_dir, f"stop, called on {socket.gethostname()}", how="now" if now else "save")
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline:
        record = read_record(run_dir)
        assert record is not None
        if record.state.over:
            return f"{record.state}: {record.outcome}"
        if is_lost(run_dir, record):
            return f"its driver (pid {record.pid} on {record.host}) is gone"
        time.sleep(_LOOK_SECONDS)
    return _end_of_wait(run_dir, record, wait_seconds, now=now)


def _end_of_wait(run_dir: Path, record: LaunchRecord, waited: float, *, now: bool) -> str:
    """Kill a driver that does not end when it should end at once, if it is on this machine. Its ranks end with it."""
    who = f"its driver (pid {record.pid} on {record.host})"
    if not now:
        raise ClusterError(f"{run_dir}: still {record.state} after {waited:.0f} s; wait on, or `stop {run_dir} --now`")
    if not record.is_here:
        raise ClusterError(f"{run_dir}: {who} has not ended after {waited:.0f} s; `kill -9 {record.pid}` there")
    with suppress(ProcessLookupError):
        if not is_lost(run_dir, record):
            os.kill(record.pid, signal.SIGKILL)
            return f"{who} had not ended after {waited:.0f} s and was killed; its ranks end with it"
    return f"{who} is gone"


def _recent(run_dir: Path) -> tuple[dict[str, Any], ...]:
    """The last steps' metrics; a line that is just being written is left out."""
    found = []
    for line in last_lines(RunFolder(run_dir).metrics, _RECENT):
        with suppress(ValueError):
            found.append(dict(from_line(line)))
    return tuple(found)


def _num_steps(recipe: Path) -> int:
    if not recipe.is_file():
        return 0
    from megatron_deepstack.config.load import load_recipe

    return load_recipe(recipe).train.steps
