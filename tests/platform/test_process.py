"""Telling a process from a later one with its number, whatever is done to the machine's clock."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

from megatron_deepstack.platform.processes.owner import this_process
from megatron_deepstack.platform.processes.process import process_start, process_ticks, still_runs


@pytest.mark.parametrize("seconds", [-3600.0, 3600.0])
def test_a_clock_that_is_set_ends_no_process(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """psutil's date of a start is counted from the system's start, whose date moves when the clock is set."""
    owner, boot_time = this_process(), psutil._pslinux.boot_time
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot_time() + seconds)
    assert abs(process_start() - owner.started - seconds) < 1
    assert still_runs(owner.pid, owner.ticks)


def test_a_later_process_of_that_number_is_another() -> None:
    assert not still_runs(os.getpid(), process_ticks() - 1)
    assert still_runs(os.getpid(), None), "a record of an earlier release does not say when it began"


def test_a_process_that_is_gone() -> None:
    with subprocess.Popen(["true"]) as gone:
        ticks = process_ticks(gone.pid)
        gone.wait()
    assert not still_runs(gone.pid, ticks)
    assert not still_runs(gone.pid, None)


def test_a_name_may_look_like_the_end_of_itself(tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 (b"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([str(program), "600"]) as process:
        try:
            own = process_ticks()
            assert own <= process_ticks(process.pid) < own + 3600 * os.sysconf("SC_CLK_TCK")
        finally:
            process.kill()
