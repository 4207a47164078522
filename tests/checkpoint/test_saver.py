"""Saves beside training: what was, bit for bit, lands on the disk; errors reach every rank; ranks agree."""

from __future__ import annotations

import mmap
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch
from trained_rank import TrainedRank, differing, saving_recipe

from megatron_deepstack.checkpoint.folder import checkpoint_path, newest_whole, partial_path, step_folders, verify
from megatron_deepstack.checkpoint.saving.plan import plan_folder
from megatron_deepstack.checkpoint.saving.writer import FileTask, StagedTensor, WriteTask, _reply_to
from megatron_deepstack.config.choices import Part, Precision, SaveMode
from megatron_deepstack.config.schema import CheckpointConfig, ParallelConfig, Recipe
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.platform.files import scratch
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.writers import own_writers

Pools = Callable[[int], RankPool]


def held_copies(saver: Any, monkey: pytest.MonkeyPatch) -> threading.Event:
    """Have copies wait until an update asks for them: the latest moment at which they may be made."""
    from megatron_deepstack.checkpoint.saving import background

    asked, plain = threading.Event(), background.copies_behind_queued_work
    wait_for_copies = type(saver).wait_for_copies

    def copies() -> Callable[[Any], None]:
        copy = plain()
        return lambda pairs: (asked.wait(60.0), copy(pairs))[1]

    def asks(self: Any) -> None:
        asked.set()
        wait_for_copies(self)

    monkey.setattr(background, "copies_behind_queued_work", copies)
    monkey.setattr(type(saver), "wait_for_copies", asks)
    return asked


def train_while_saving(rank: int, recipe: Recipe) -> tuple[bool, int, list[str], list[float]]:
    """Save, then train on before anything is copied. Was the copy late, updates made meanwhile, what differs, times."""
    with pytest.MonkeyPatch.context() as monkey:
        trained = TrainedRank(recipe)
        trained.step()
        asked = held_copies(trained.saver, monkey)
        expected = trained.state()
        trained.saver.begin(1)
        late = not asked.is_set()
        saved, updates = None, 0
        while saved is None:
            trained.step()
            updates += 1
            saved = trained.saver.poll()
        changed = differing(trained.state(), expected)
        trained.saver.close()
    assert changed, "training changed nothing"
    again = TrainedRank(replace(recipe, train=replace(recipe.train, seed=99)))
    again.load(saved.path)
    again.saver.close()
    return late, updates, differing(again.state(), expected), [saved.stall_seconds, saved.seconds]


LAYOUTS = [
    ("pp2", 2, ParallelConfig(pipeline=2), Precision.FP32, tuple(Part)),
    ("pp2-vpp2-bf16", 2, ParallelConfig(pipeline=2, virtual_pipeline=2), Precision.BF16, tuple(Part)),
    ("tp2-sp", 2, ParallelConfig(tensor=2, sequence_parallel=True), Precision.FP32, tuple(Part)),
    ("dp2-zero", 2, ParallelConfig(distributed_optimizer=True), Precision.FP32, tuple(Part)),
    ("dp2-zero-bf16", 2, ParallelConfig(distributed_optimizer=True), Precision.BF16, tuple(Part)),
    ("pp2-projector", 2, ParallelConfig(pipeline=2), Precision.FP32, (Part.PROJECTOR,)),
    (
        "tp2-dp2-zero-bf16",
        4,
        ParallelConfig(tensor=2, distributed_optimizer=True),
        Precision.BF16,
        (Part.PROJECTOR, Part.LANGUAGE),
    ),
]


@pytest.mark.parametrize(
    ("num_ranks", "parallel", "precision", "trainable"),
    [
        pytest.param(*row[1:], id=row[0], marks=[pytest.mark.slow] * (row[0] not in ("pp2-vpp2-bf16", "dp2-zero")))
        for row in LAYOUTS
    ],
)
def test_what_was_is_saved_while_training_goes_on(
    ranks: Pools,
    tmp_path: Path,
    num_ranks: int,
    parallel: ParallelConfig,
    precision: Precision,
    trainable: tuple[Part, ...],
) -> None:
    recipe = saving_recipe(tmp_path, parallel, precision=precision, trainable=trainable)
    for late, updates, different, (stall, seconds) in ranks(num_ranks).run(train_while_saving, recipe):
        assert late
        assert updates >= 1
        assert different == []
        assert 0 < stall <= seconds


def save_often(rank: int, recipe: Recipe) -> list[Any]:
    """Begin four saves in successive steps; what poll and finish reported."""
    trained = TrainedRank(recipe)
    reported = []
    for _ in range(4):
        trained.step()
        trained.saver.begin(trained.done)
        reported.append(trained.saver.poll())
    reported.append(trained.saver.finish())
    assert trained.saver.finish() is None
    assert trained.saver.take_stall_seconds() > 0
    assert trained.saver.take_stall_seconds() == 0
    trained.saver.close()
    return [saved and (saved.step, saved.waited_seconds > 0) for saved in reported]


def save_where_the_temporary_folder_is_gone(rank: int, recipe: Recipe) -> bool:
    """Save in a long run, whose temporary folder has been cleaned away meanwhile."""
    with pytest.MonkeyPatch.context() as monkey:
        trained = TrainedRank(recipe)
        trained.step()
        monkey.setattr(tempfile, "tempdir", f"{recipe.run_dir}/gone")
        path = trained.save()
        trained.saver.close()
    return path.is_dir()


def test_no_save_needs_the_temporary_folder(ranks: Pools, tmp_path: Path) -> None:
    assert ranks(2).run(save_where_the_temporary_folder_is_gone, saving_recipe(tmp_path)) == [True, True]


def test_a_machine_without_room_for_a_plan_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "MEMORY", tmp_path / "no memory")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    words = r"\(.*no memory: No such file or directory; .*gone: No such.*another folder in TMPDIR"
    with pytest.raises(CheckpointError, match=words), plan_folder():
        pass
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with plan_folder() as folder:
        assert folder.is_relative_to(tmp_path)
        assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_save_waits_for_the_one_before(ranks: Pools, tmp_path: Path) -> None:
    """Every one becomes whole, in order; retention is applied to each."""
    recipe = replace(saving_recipe(tmp_path), checkpoint=CheckpointConfig(keep=2, keep_every=3))
    for reported in ranks(2).run(save_often, recipe):
        assert [one for one in reported if one] == [(1, True), (2, True), (3, True), (4, True)]
    assert [step for step, _ in step_folders(tmp_path)] == [3, 4]
    recipe = replace(recipe, checkpoint=CheckpointConfig(keep=1, keep_every=2), run_dir=str(tmp_path / "other"))
    ranks(2).run(save_often, recipe)
    assert [step for step, _ in step_folders(recipe.run_dir)] == [2, 4]


def test_synchronous_saves_are_whole_when_begin_returns(ranks: Pools, tmp_path: Path) -> None:
    recipe = replace(saving_recipe(tmp_path), checkpoint=CheckpointConfig(mode=SaveMode.SYNC, keep=0))
    for reported in ranks(2).run(save_often, recipe):
        assert [one and one[0] for one in reported] == [1, 2, 3, 4, None]
    for step, path in step_folders(tmp_path):
        assert verify(path).manifest.step == step


def test_what_is_recorded(ranks: Pools, tmp_path: Path) -> None:
    """Layout, versions, the resolved recipe, and every file but the manifest itself."""

    ranks(2).run(save_often, saving_recipe(tmp_path))
    checkpoint, _ = newest_whole(tmp_path)
    assert checkpoint is not None
    manifest = checkpoint.manifest
    assert manifest.layout == {"tp": 1, "cp": 1, "dp": 1, "pp": 2, "vpp": 1}
    assert manifest.made_with["torch"] == torch.__version__
    release, _, _ = megatron.core.__version__.partition("+")  # 0.19 names a commit behind it
    assert manifest.made_with["megatron-core"] == release
    names = {file.name for file in checkpoint.path.iterdir()}
    assert names == {*manifest.files, "manifest.json"}
    assert {"recipe.yaml", ".metadata", "__0_0.distcp", "__1_0.distcp"} <= names
    assert "pipeline: 2" in (checkpoint.path / "recipe.yaml").read_text()


@own_writers()
def fail_to_save(rank: int, recipe: Recipe, kill_writer: bool) -> str:
    """The second save fails on rank 1 alone; the words of the error."""
    trained = TrainedRank(recipe)
    trained.step()
    trained.saver.begin(1)
    trained.saver.finish()
    background = trained.saver._background
    assert background is not None
    if rank == 1 and kill_writer:
        background._process.kill()
    elif rank == 1:
        job_folder = partial_path(checkpoint_path(recipe.run_dir, 2)) / "__1_0.distcp"
        job_folder.mkdir(parents=True)
    trained.step()
    trained.saver.begin(2)
    try:
        trained.saver.finish()
    except CheckpointError as error:
        words = str(error)
    trained.step()
    trained.saver.begin(3)
    assert trained.saver.finish() is not None
    trained.saver.close()
    return words


@pytest.mark.parametrize(
    "kill_writer",
    [
        pytest.param(True, id="writer-killed", marks=pytest.mark.slow),
        pytest.param(False, id="file-refused", marks=pytest.mark.slow),
    ],
)
def test_a_failed_write_reaches_every_rank(ranks: Pools, tmp_path: Path, kill_writer: bool) -> None:
    """The same words everywhere; nothing half-written stays, the earlier checkpoint does, and a later save works."""
    recipe = saving_recipe(tmp_path)
    first, second = ranks(2).run(fail_to_save, recipe, kill_writer)
    assert first == second
    assert "the checkpoint after step 2 could not be written" in first
    assert ("rank 1: its writer process ended" if kill_writer else "rank 1: [Errno 21] Is a directory") in first
    assert "rank 0" not in first
    assert "goes on from there" in first
    assert [step for step, _ in step_folders(tmp_path)] == [1, 3]
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("num_floats", [100, 1 << 16])
def test_a_full_disk_is_named_wherever_torch_meets_it(tmp_path: Path, num_floats: int) -> None:
    (tmp_path / "__0_0.distcp").symlink_to("/dev/full")
    memory = mmap.mmap(-1, 4 * num_floats)
    tensors = [StagedTensor(("weight", None, None), torch.float32, (num_floats,), 0)] * 20
    reply = _reply_to(WriteTask(str(tmp_path), 0, [FileTask("__0_0.distcp", [], tensors)], {}), memory)
    assert reply.error is not None
    assert "No space left on device" in reply.error


@own_writers()
def writers_left(rank: int, recipe: Recipe) -> list[int]:
    """Child processes of this rank that a run leaves which is given up in the middle of a save."""
    import psutil

    trained = TrainedRank(recipe)
    trained.step()
    before = set(psutil.Process().children())
    trained.saver.begin(1)
    assert set(psutil.Process().children()) > before
    trained.saver.close()
    trained.saver.close()
    return [child.pid for child in set(psutil.Process().children()) - before]


def test_nothing_is_left_after_closing(ranks: Pools, tmp_path: Path) -> None:
    assert ranks(2).run(writers_left, saving_recipe(tmp_path)) == [[], []]
    assert newest_whole(tmp_path) == (None, [])


def save_into_locked(rank: int, recipe: Recipe) -> str:
    trained = TrainedRank(recipe)
    trained.step()
    trained.saver.begin(1)
    try:
        trained.saver.finish()
    except CheckpointError as error:
        return str(error)
    return ""


def test_two_runs_in_one_folder(ranks: Pools, tmp_path: Path) -> None:
    """Every rank of the second is told, and the first one's files are not touched."""
    from megatron_deepstack.checkpoint.saving.retention import FolderLock

    partial = partial_path(checkpoint_path(tmp_path, 1))
    lock = FolderLock(partial)
    theirs = {name: f"the first run's {name}" for name in ("__0_0.distcp", "__1_0.distcp")}
    for name, content in theirs.items():
        (partial / name).write_text(content)
    first, second = ranks(2).run(save_into_locked, saving_recipe(tmp_path))
    lock.release()
    assert first == second
    assert "rank 0: " in first
    assert "two runs share a run_dir" in first
    assert {file.name: file.read_text() for file in partial.glob("*.distcp")} == theirs
    assert not list(partial.glob(".written_by*"))
