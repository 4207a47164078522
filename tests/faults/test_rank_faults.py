"""Faults of ranks and of their data: what is found, what is said, and that the losses afterwards are the undisturbed
run's, bit for bit."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fault_runs
import pytest
from fault_runs import TrainCommand, course_of, fault_recipe, last_step, records_of

from megatron_deepstack.checkpoint.folder import newest_whole
from megatron_deepstack.config.choices import Unreadable
from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.errors import HangError, HealthError, PreemptedError, RankError, StoreError
from megatron_deepstack.testing.ranks import RankPool

Pools = Callable[[int], RankPool]
RecordFault = Callable[..., None]
STEPS, INTERVAL = 90, 6
FAULT_STEP = 10


@pytest.fixture(scope="module")
def undisturbed(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe of a finished run without faults."""
    recipe = fault_recipe(tmp_path_factory.mktemp("faults"), steps=STEPS, interval=INTERVAL)
    ranks(2).run(fault_runs.train_on_rank, recipe)
    assert last_step(recipe.run_dir) == STEPS
    return recipe


def in_folder(recipe: Recipe, folder: Path) -> Recipe:
    """The same run in another folder."""
    return replace(recipe, run_dir=str(folder / "run"))


def assert_same_course(recipe: Recipe, undisturbed: Recipe) -> None:
    assert course_of(recipe.run_dir) == course_of(undisturbed.run_dir)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_rank(undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault, stage: int) -> None:
    """All ranks start again by themselves; the reason is told once, with the rank."""
    recipe = in_folder(undisturbed, tmp_path)
    with TrainCommand(recipe, "--restarts", "1") as command:
        command.until_saved()
        pid = command.pid(stage)
        done = command.hit(stage, signal.SIGKILL)
        seconds = command.until_said(r"killed by signal 9")
        assert command.end() == 0
    assert command.text.count("killed by signal 9") == 1
    assert f"rank {stage} (pid {pid}) was killed by signal 9 (SIGKILL)" in command.text
    assert "Traceback" not in command.text
    assert command.attempts == 2
    assert command.resumed % INTERVAL == 0 < command.resumed
    assert_same_course(recipe, undisturbed)
    record_fault(
        fault=f"kill -9 of the rank of stage {stage}",
        found_after=f"{seconds:.1f} s",
        lost_steps=done - command.resumed,
        outcome="restarted by itself, same losses",
    )


def test_without_restarts_the_same_command_goes_on(
    undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault
) -> None:
    """The run ends with the rank's name and what to do; so does a launcher that is killed take its ranks with it."""
    recipe = in_folder(undisturbed, tmp_path)
    with TrainCommand(recipe) as command:
        command.until_saved()
        done = command.hit(1, signal.SIGKILL)
        assert command.end() == RankError.exit_code
    assert "rank 1" in command.text
    assert "run the same command again" in command.text
    with TrainCommand(recipe) as second:
        second.until_saved()
        second.process.kill()
        second.process.wait()
        stopped = last_step(recipe.run_dir)
    with TrainCommand(recipe) as third:
        assert third.end() == 0
    assert_same_course(recipe, undisturbed)
    lost = done - second.resumed
    record_fault(
        fault="kill -9 of a rank, no restarts",
        found_after="at once",
        lost_steps=lost,
        outcome="ended with the rank named; the same command went on, same losses",
    )
    record_fault(
        fault="kill -9 of the launcher",
        found_after="at once",
        lost_steps=stopped - third.resumed,
        outcome="ranks ended too; the same command went on, same losses",
    )


def test_a_stopped_rank(undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault) -> None:
    """SIGSTOP: the others name the silent rank, show their stacks, and all start again."""
    recipe = in_folder(undisturbed, tmp_path)
    recipe = replace(recipe, health=replace(recipe.health, hang_seconds=4.0))
    with TrainCommand(recipe, "--restarts", "1") as command:
        command.until_saved()
        pid = command.pid(1)
        done = command.hit(1, signal.SIGSTOP)
        seconds = command.until_said(r"starting all ranks again")
        assert command.end() == 0
    assert f"silent: rank 1 (pid {pid} on" in command.text
    assert "waiting: rank 0 (pid" in command.text
    stacks = Path(recipe.run_dir, "stacks", "rank_00000.txt").read_text()
    assert "gradient_sums" in stacks
    assert_same_course(recipe, undisturbed)
    record_fault(
        fault="SIGSTOP of a rank",
        found_after=f"{seconds:.1f} s (health.hang_seconds 4)",
        lost_steps=done - command.resumed,
        outcome="silent rank named, stacks written, restarted by itself, same losses",
    )


def test_a_stopped_rank_without_restarts(undisturbed: Recipe, tmp_path: Path) -> None:
    recipe = in_folder(undisturbed, tmp_path)
    recipe = replace(recipe, health=replace(recipe.health, hang_seconds=4.0))
    with TrainCommand(recipe) as command:
        command.until_step(FAULT_STEP)
        command.hit(0, signal.SIGSTOP)
        assert command.end() == HangError.exit_code
    assert "silent: rank 0 (pid" in command.text


@pytest.mark.parametrize("target", ["launcher", "rank 1"])
def test_asked_to_stop(undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault, target: str) -> None:
    """SIGTERM: every rank saves after the same step, and the exit code says so."""
    recipe = in_folder(undisturbed, tmp_path)
    with TrainCommand(recipe, "--restarts", "3") as command:
        done = command.until_step(FAULT_STEP)
        if target == "launcher":
            command.process.send_signal(signal.SIGTERM)
        else:
            command.hit(1, signal.SIGTERM)
        assert command.end() == PreemptedError.exit_code
    stopped = last_step(recipe.run_dir)
    assert f"asked to stop: saved after step {stopped} of {STEPS}; run the same command again" in command.text
    newest, _ = newest_whole(recipe.run_dir)
    assert newest is not None
    assert newest.manifest.step == stopped
    with TrainCommand(recipe) as second:
        assert second.end() == 0
    assert second.resumed == stopped
    assert_same_course(recipe, undisturbed)
    record_fault(
        fault=f"SIGTERM to {target}",
        found_after=f"{stopped - done} steps",
        lost_steps=0,
        outcome="saved, exit 75; the same command went on, same losses",
    )


def without_a_shard(recipe: Recipe, folder: Path) -> tuple[Recipe, Path]:
    """The recipe on a copy of its store that lacks one shard, and where the shard is now."""
    store = folder / "store.zarr"
    shutil.copytree(str(recipe.data.store), store)
    shards = sorted(file for file in (store / "images" / "pixels" / "c").rglob("*") if file.is_file())
    hidden = folder / "shard"
    shards[-1].rename(hidden)
    recipe = replace(recipe, data=replace(recipe.data, store=str(store)))
    return replace(recipe, checkpoint=replace(recipe.checkpoint, interval=1)), hidden


def test_a_missing_shard(undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault) -> None:
    """The run ends on all ranks with sample and shard named; once the shard is back, the same command goes on."""
    recipe, hidden = without_a_shard(in_folder(undisturbed, tmp_path), tmp_path)
    with TrainCommand(recipe, "--restarts", "3") as command:
        assert command.end() == StoreError.exit_code
    assert command.text.count("sample 'tiny-") == 1
    assert "Restore the shard" in command.text
    assert "starting all ranks again" not in command.text
    done = last_step(recipe.run_dir)
    shard = next(line for line in command.text.split() if "images/pixels/c" in line).rstrip(":;,.")
    hidden.rename(shard)
    with TrainCommand(recipe) as second:
        assert second.end() == 0
    assert_same_course(recipe, undisturbed)
    record_fault(
        fault="missing shard",
        found_after=f"step {done + 1}, the first that reads it",
        lost_steps=done - second.resumed,
        outcome="ended with sample and shard named; the same command went on, same losses",
    )


def test_unreadable_samples_are_left_out(
    ranks: Pools, undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault
) -> None:
    """`data.unreadable: skip`: the samples are counted and named; also across a stop, bit for bit."""
    recipe, _ = without_a_shard(in_folder(undisturbed, tmp_path), tmp_path)
    recipe = replace(recipe, data=replace(recipe.data, unreadable=Unreadable.SKIP))
    recipe = replace(recipe, train=replace(recipe.train, steps=12))
    ranks(2).run(fault_runs.train_on_rank, recipe)
    records = records_of(recipe.run_dir)
    assert len(records) == 12
    lost = [record for record in records if record["unreadable"]]
    assert {name for record in lost for name in record["unreadable_samples"]} == {"tiny-8", "tiny-10"}
    assert sum(record["unreadable"] for record in lost) == sum(len(r["unreadable_samples"]) for r in lost)
    halves = replace(recipe, run_dir=str(tmp_path / "halves"))
    ranks(2).run(fault_runs.train_on_rank, halves, 5)
    ranks(2).run(fault_runs.train_on_rank, halves)
    assert course_of(halves.run_dir) == course_of(recipe.run_dir)
    record_fault(
        fault="unreadable samples, data.unreadable=skip",
        found_after=f"step {lost[0]['step']}",
        lost_steps=0,
        outcome=f"left out and counted: {sum(record['unreadable'] for record in lost)} in 12 steps",
    )


def test_too_many_unreadable_samples(undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault) -> None:
    recipe, _ = without_a_shard(in_folder(undisturbed, tmp_path), tmp_path)
    recipe = replace(
        recipe,
        data=replace(recipe.data, unreadable=Unreadable.SKIP),
        health=replace(recipe.health, max_unreadable_samples=2),
    )
    with TrainCommand(recipe, "--restarts", "3") as command:
        assert command.end() == HealthError.exit_code
    records = records_of(recipe.run_dir)
    assert sum(record["unreadable"] for record in records) > 2 >= sum(record["unreadable"] for record in records[:-1])
    assert "health.max_unreadable_samples allows 2" in command.text
    record_fault(
        fault="more unreadable samples than allowed",
        found_after=f"step {records[-1]['step']}",
        lost_steps=0,
        outcome="ended with their count and what to do",
    )


def test_a_killed_rank_of_four(ranks: Pools, tmp_path: Path, record_fault: RecordFault) -> None:
    """Two replicas of two stages under the distributed optimizer; the last stage of the second one dies."""
    parallel = ParallelConfig(pipeline=2, distributed_optimizer=True)
    recipe = fault_recipe(tmp_path, steps=STEPS, interval=INTERVAL, parallel=parallel)
    ranks(4).run(fault_runs.train_on_rank, recipe)
    killed = in_folder(recipe, tmp_path)
    with TrainCommand(killed, "--ranks", "4", "--restarts", "1") as command:
        command.until_saved()
        done = command.hit(3, signal.SIGKILL)
        seconds = command.until_said(r"rank 3 \(pid \d+\) was killed by signal 9")
        assert command.end() == 0
    assert_same_course(killed, recipe)
    record_fault(
        fault="kill -9 of one rank of four (PP=2, DP=2, sharded optimizer)",
        found_after=f"{seconds:.1f} s",
        lost_steps=done - command.resumed,
        outcome="restarted by itself, same losses",
    )


def train_poisoned(rank: int, recipe: Recipe, steps: tuple[int, ...], stop_after: int | None = None) -> None:
    """Train with a NaN in one gradient of rank 1 in these 0-based steps."""
    from megatron_deepstack.training import loop

    sound = loop.gradient_sums

    def poisoned(engine: Any, plan: Any, pixels: Any, clock: Any) -> Any:
        loss = sound(engine, plan, pixels, clock)
        if rank == 1 and session_step["number"] in steps:
            engine.wrapped[0].buffers[0].grad_data[0] = math.nan
        session_step["number"] += 1
        return loss

    newest, _ = newest_whole(recipe.run_dir)
    session_step = {"number": 0 if newest is None else newest.manifest.step}
    loop.gradient_sums = poisoned  # type: ignore[assignment]
    try:
        fault_runs.train_on_rank(rank, recipe, stop_after)
    finally:
        loop.gradient_sums = sound


def test_nan_in_a_gradient(ranks: Pools, undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault) -> None:
    """Two steps are left out and named; a stop between them changes nothing, to the last bit."""
    recipe = in_folder(undisturbed, tmp_path)
    recipe = replace(recipe, train=replace(recipe.train, steps=12))
    halves = replace(recipe, run_dir=str(tmp_path / "halves"))
    ranks(2).run(train_poisoned, recipe, (4, 5))
    ranks(2).run(train_poisoned, halves, (4, 5), 5)
    ranks(2).run(train_poisoned, halves, (4, 5))
    for run in (recipe, halves):
        records = records_of(run.run_dir)
        assert [record["step"] for record in records if not record["applied"]] == [5, 6]
        assert [record["skipped_steps"] for record in records] == [0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0]
        assert [len(record["samples"]) for record in records] == [0, 0, 0, 0, 4, 4, 0, 0, 0, 0, 0, 0]
        assert all(name.startswith("tiny-") for record in records for name in record["samples"])
        assert math.isnan(records[4]["gradient_norm"])
    assert [step[:2] for step in course_of(halves.run_dir)] == [step[:2] for step in course_of(recipe.run_dir)]
    record_fault(
        fault="NaN in a gradient of one rank, twice",
        found_after="in the step",
        lost_steps=2,
        outcome="steps left out on all ranks, samples named",
    )


def test_nan_beyond_the_limit(ranks: Pools, undisturbed: Recipe, tmp_path: Path, record_fault: RecordFault) -> None:
    """The run stops and lists the samples; once the cause is gone it goes on from the checkpoint before."""
    recipe = in_folder(undisturbed, tmp_path)
    recipe = replace(recipe, health=replace(recipe.health, max_skipped_steps=1))
    with pytest.raises(RankError) as caught:
        ranks(2).run(train_poisoned, recipe, tuple(range(7, 90)))
    error = caught.value.__cause__
    assert isinstance(error, HealthError)
    assert not error.retryable
    assert "2 steps in a row" in str(error)
    assert "step 8: tiny-" in str(error)
    assert "step 9: tiny-" in str(error)
    assert last_step(recipe.run_dir) == 9
    newest, _ = newest_whole(recipe.run_dir)
    assert newest is not None
    assert newest.manifest.step == 6
    ranks(2).run(fault_runs.train_on_rank, recipe)
    assert_same_course(recipe, undisturbed)
    record_fault(
        fault="NaN in gradients, more steps than allowed",
        found_after="step 9, the second in a row",
        lost_steps=3,
        outcome="ended with the samples listed; the same command went on without the fault, same losses",
    )
