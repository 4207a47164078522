"""Faults of checkpoints: a save that is cut short, files that are damaged, a disk that is full.

Nothing half-written is ever taken for a checkpoint, and the losses afterwards are the undisturbed run's, bit for bit.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fault_runs
import psutil
import pytest
from fault_runs import TrainCommand, course_of, fault_recipe, last_step, resumed_after

from megatron_deepstack.checkpoint.folder import MANIFEST, checkpoint_path, newest_whole, partial_path, step_folders
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.testing.ranks import RankPool

Pools = Callable[[int], RankPool]
RecordFault = Callable[..., None]
STEPS, INTERVAL, STOP = 60, 6, 20


@pytest.fixture(scope="module")
def undisturbed(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe of a finished run without faults."""
    recipe = fault_recipe(tmp_path_factory.mktemp("checkpoint-faults"), steps=STEPS, interval=INTERVAL)
    ranks(2).run(fault_runs.train_on_rank, recipe)
    assert last_step(recipe.run_dir) == STEPS
    return recipe


@pytest.fixture(scope="module")
def half(ranks: Pools, undisturbed: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, stopped after step 20: checkpoints after steps 18 and 20."""
    folder = tmp_path_factory.mktemp("half") / "run"
    ranks(2).run(fault_runs.train_on_rank, replace(undisturbed, run_dir=str(folder)), STOP)
    assert [step for step, _ in step_folders(folder)] == [18, STOP]
    return folder


def writer_of(command: TrainCommand, rank: int) -> psutil.Process:
    """The process that writes a rank's files."""
    children = psutil.Process(command.pid(rank)).children()
    (writer,) = [child for child in children if "checkpoint.saving.writer" in " ".join(child.cmdline())]
    return writer


def hold_a_save(command: TrainCommand) -> tuple[int, psutil.Process]:
    """Have rank 0's writer stand still in the middle of a save; the save's step, and the writer."""
    command.until_saved()
    writer = writer_of(command, 0)
    writer.suspend()
    whole = {step for step, _ in step_folders(command.run_dir)}
    command.until(lambda: partials(command.run_dir), "a save in flight")
    (partial,) = partials(command.run_dir)
    step = int(partial.name.removeprefix("step_").removesuffix(".partial"))
    assert step not in whole
    return step, writer


def partials(run_dir: str | Path) -> list[Path]:
    return list((Path(run_dir) / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_during_a_save(undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault, rank: int) -> None:
    """The save is lost with its writer; the checkpoint before it is taken, and what was half-written is removed."""
    recipe = replace(undisturbed, run_dir=str(tmp_path / "run"))
    with TrainCommand(recipe, "--restarts", "1") as command:
        saving, writer = hold_a_save(command)
        done = command.hit(rank, signal.SIGKILL)
        seconds = command.until_said("killed by signal 9")
        command.until(lambda: not writer.is_running(), "the writer's end")
        assert command.end() == 0
    (resumed,) = resumed_after(command.text)
    assert resumed == saving - INTERVAL
    assert not partials(recipe.run_dir)
    assert course_of(recipe.run_dir) == course_of(undisturbed.run_dir)
    record_fault(
        fault=f"kill -9 of rank {rank} during an asynchronous save",
        found_after=f"{seconds:.1f} s",
        lost_steps=done - resumed,
        outcome="restarted from the checkpoint before, same losses",
    )


def test_a_killed_writer(undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault) -> None:
    """A save that cannot become whole stops the run, which says what is left and what to do."""
    recipe = replace(undisturbed, run_dir=str(tmp_path / "run"))
    with TrainCommand(recipe) as command:
        saving, writer = hold_a_save(command)
        writer.kill()
        seconds = command.until_said("could not be written")
        done = last_step(recipe.run_dir)
        assert command.end() == CheckpointError.exit_code
    assert f"the checkpoint after step {saving} could not be written" in command.text
    assert "rank 0: its writer process ended with exit code -9" in command.text
    assert f"that after step {saving - INTERVAL}" in command.text
    assert not partials(recipe.run_dir)
    with TrainCommand(recipe) as again:
        assert again.end() == 0
    (resumed,) = resumed_after(again.text)
    assert course_of(recipe.run_dir) == course_of(undisturbed.run_dir)
    record_fault(
        fault="kill -9 of a rank's checkpoint writer",
        found_after=f"{seconds:.1f} s",
        lost_steps=done - resumed,
        outcome="stopped with what to do; the same command went on, same losses",
    )


def flip_a_bit(folder: Path) -> str:
    file = largest(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return f"{file.name} is damaged"


def truncate(folder: Path) -> str:
    file = largest(folder)
    os.truncate(file, file.stat().st_size - 10)
    return f"{file.name} has {file.stat().st_size} bytes, {file.stat().st_size + 10} were written"


def remove_a_file(folder: Path) -> str:
    file = largest(folder)
    file.unlink()
    return f"the file {file.name} is missing"


def remove_the_manifest(folder: Path) -> str:
    (folder / MANIFEST).unlink()
    return f"its {MANIFEST} is missing"


def largest(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)


DAMAGES = {
    "a flipped bit in a checkpoint file": flip_a_bit,
    "a truncated checkpoint file": truncate,
    "a missing checkpoint file": remove_a_file,
    "a checkpoint without its manifest": remove_the_manifest,
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_damage(undisturbed: Recipe, half: Path, tmp_path: Path, record_fault: RecordFault, fault: str) -> None:
    """The newest checkpoint is named with what is wrong and passed over; there is no pointer that could be lost too."""
    recipe = replace(undisturbed, run_dir=str(tmp_path / "run"))
    shutil.copytree(half, recipe.run_dir)
    newest = checkpoint_path(recipe.run_dir, STOP)
    words = DAMAGES[fault](newest)
    with TrainCommand(recipe) as command:
        assert command.end() == 0
    assert f"not whole, passed over: {newest}: {words}" in command.text
    assert resumed_after(command.text) == [18]
    assert course_of(recipe.run_dir) == course_of(undisturbed.run_dir)
    record_fault(
        fault=fault,
        found_after="on resuming",
        lost_steps=STOP - 18,
        outcome="named; the one before was taken, same losses",
    )


def test_every_checkpoint_is_damaged(
    undisturbed: Recipe, half: Path, tmp_path: Path, record_fault: RecordFault
) -> None:
    """Never a silent start from scratch."""
    recipe = replace(undisturbed, run_dir=str(tmp_path / "run"))
    shutil.copytree(half, recipe.run_dir)
    words = [damage(checkpoint_path(recipe.run_dir, step)) for step, damage in ((18, truncate), (STOP, flip_a_bit))]
    with TrainCommand(recipe) as command:
        assert command.end() == CheckpointError.exit_code
    assert "no whole checkpoint among 2" in command.text
    assert "Restore one, or remove the folder `checkpoints` to start over" in command.text
    assert all(word in command.text for word in words)
    assert "Traceback" not in command.text
    record_fault(
        fault="all checkpoints damaged",
        found_after="on resuming",
        lost_steps=0,
        outcome="refused, each named with what to do",
    )


def test_what_a_dead_save_left(undisturbed: Recipe, half: Path, tmp_path: Path, record_fault: RecordFault) -> None:
    """A folder that never got its name is no checkpoint, however complete it looks, and is removed."""
    recipe = replace(undisturbed, run_dir=str(tmp_path / "run"))
    shutil.copytree(half, recipe.run_dir)
    newest = checkpoint_path(recipe.run_dir, STOP)
    newest.rename(partial_path(newest))
    with TrainCommand(recipe) as command:
        command.until_said("resuming after step")
        assert not partial_path(newest).exists()
        assert command.end() == 0
    assert resumed_after(command.text) == [18]
    assert course_of(recipe.run_dir) == course_of(undisturbed.run_dir)
    record_fault(
        fault="a leftover of a save that was cut short",
        found_after="on resuming",
        lost_steps=STOP - 18,
        outcome="removed; the one before was taken, same losses",
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 7 MiB, for about three checkpoints of this model."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    if mount("-t", "tmpfs", "-o", "size=7m", "tmpfs", str(folder)):
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode


def test_a_full_disk(undisturbed: Recipe, small_disk: Path, record_fault: RecordFault) -> None:
    """The run stops at the save that did not fit, and says so; what was saved stays whole; with space it goes on."""
    recipe = replace(
        undisturbed,
        run_dir=str(small_disk.parent),
        checkpoint=replace(undisturbed.checkpoint, keep=0),
    )
    with TrainCommand(recipe) as command:
        assert command.end() == CheckpointError.exit_code
    done = last_step(recipe.run_dir)
    assert "No space left on device" in command.text
    assert "could not be written" in command.text
    assert "Make the disk usable again (space, quota, permissions" in command.text
    assert "Traceback" not in command.text
    assert not partials(recipe.run_dir)
    checkpoint, faults = newest_whole(recipe.run_dir)
    assert checkpoint is not None
    assert faults == []
    assert f"that after step {checkpoint.manifest.step}" in command.text
    assert mount("-o", "remount,size=64m", str(small_disk)) == 0
    with TrainCommand(recipe) as again:
        assert again.end() == 0
    assert resumed_after(again.text) == [checkpoint.manifest.step]
    assert course_of(recipe.run_dir) == course_of(undisturbed.run_dir)
    record_fault(
        fault="a full disk during a save",
        found_after="at the save",
        lost_steps=done - checkpoint.manifest.step,
        outcome="stopped with what to do; with space the same command went on, same losses",
    )
