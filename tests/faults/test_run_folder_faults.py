"""A run folder whose disk fills up while a real run trains: one line, with what to do, and the same command goes on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fault_runs import TrainCommand, fault_recipe, last_step, resumed_after

from megatron_deepstack.errors import RunFolderError

RecordFault = Callable[..., None]
STEPS = 400


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB; mounting one takes root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_during_training(small_disk: Path, tmp_path: Path, record_fault: RecordFault) -> None:
    recipe = replace(fault_recipe(tmp_path, steps=STEPS, interval=0), run_dir=str(small_disk / "run"))
    with TrainCommand(recipe, "--stop-after", "2") as first:
        assert first.end() == 0
    with TrainCommand(recipe) as command:
        command.until_step(5)
        filler = small_disk / "filler"
        with filler.open("wb") as file:
            free = os.statvfs(small_disk)
            file.truncate(0)
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
        code = command.end()
    assert code == RunFolderError.exit_code, command.text
    assert last_step(recipe.run_dir) < STEPS, "the fault did not fire"
    assert "cannot be written (No space left on device" in command.text
    assert "Make room on that disk" in command.text
    assert "Traceback" not in command.text
    done = last_step(recipe.run_dir)
    filler.unlink()
    with TrainCommand(recipe, "--stop-after", "3") as again:
        assert again.end() == 0
    assert resumed_after(again.text) == [2]
    record_fault(
        fault="the run folder's disk full during training",
        found_after="the next record",
        lost_steps=done - 2,
        outcome="one line with what to do; the same command went on",
    )
