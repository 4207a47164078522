"""Stopping and going on, bit for bit, wherever it could differ: layouts, placements, packing, trained parts, epochs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megatron_deepstack.checkpoint.folder import step_folders
from megatron_deepstack.config.choices import Batching, EncoderPlacement, Part, Precision, SaveMode
from megatron_deepstack.config.schema import DataConfig, ParallelConfig, Recipe, StackConfig
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_model, tiny_recipe
from megatron_deepstack.testing.tiny_store import write_tiny_store

Pools = Callable[[int], RankPool]
STEPS, BATCH = 6, 4


@dataclass(frozen=True)
class Case:
    """A run, and where it is stopped."""

    num_ranks: int
    parallel: ParallelConfig
    batching: Batching = Batching.PADDED
    trainable: tuple[Part, ...] = tuple(Part)
    precision: Precision = Precision.FP32
    stop: int = 4
    mode: SaveMode = SaveMode.ASYNC


PP2, ZERO = ParallelConfig(pipeline=2), ParallelConfig(distributed_optimizer=True)
CASES = {
    "one": Case(1, ParallelConfig()),
    "pp4": Case(4, ParallelConfig(pipeline=4)),
    "pp2-vpp2": Case(2, replace(PP2, virtual_pipeline=2)),
    "tp2-sp-pp2": Case(4, replace(PP2, tensor=2, sequence_parallel=True)),
    "cp2": Case(2, ParallelConfig(context=2)),
    "cp2-bf16": Case(2, ParallelConfig(context=2), precision=Precision.BF16),
    "dp2": Case(2, ParallelConfig()),
    "pp2-dp2-zero": Case(4, replace(PP2, distributed_optimizer=True)),
    "tp2-dp2-zero-bf16": Case(4, replace(ZERO, tensor=2), precision=Precision.BF16),
    "inline": Case(2, replace(PP2, encoder_placement=EncoderPlacement.INLINE)),
    "packed": Case(2, PP2, batching=Batching.PACKED),
    "projector": Case(2, PP2, trainable=(Part.PROJECTOR,)),
    "projector-language": Case(2, PP2, trainable=(Part.PROJECTOR, Part.LANGUAGE)),
    "projector-zero": Case(2, ZERO, trainable=(Part.PROJECTOR,)),
    "epoch-boundary": Case(2, PP2, stop=3),
    "synchronous": Case(2, PP2, mode=SaveMode.SYNC),
}


def train_on_rank(rank: int, recipe: Recipe, stop_after: int | None) -> None:
    from megatron_deepstack.training.loop import run

    run(recipe, groups_for(recipe.parallel), stop_after)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume-cases") / "store.zarr"
    write_tiny_store(path)
    return path


def recipe_of(case: Case, store: Path, folder: Path) -> Recipe:
    inline = case.parallel.encoder_placement is EncoderPlacement.INLINE
    model = tiny_model(stacks=StackConfig(slots=(0, 1, 2, 3))) if inline else tiny_model()
    recipe = tiny_recipe(
        model, case.parallel, trainable=case.trainable, precision=case.precision, global_batch_size=BATCH
    )
    return replace(
        recipe,
        run_dir=str(folder),
        data=DataConfig(store=str(store)),
        train=replace(recipe.train, steps=STEPS, batching=case.batching),
        checkpoint=replace(recipe.checkpoint, interval=1, mode=case.mode),
    )


def course_of(run_dir: str) -> list[tuple[int, float, float]]:
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"], r["gradient_norm"]) for r in map(json.loads, lines)]


@pytest.mark.parametrize("name", CASES)
def test_resumed_run_is_the_run_without_a_stop(ranks: Pools, store: Path, tmp_path: Path, name: str) -> None:
    """A checkpoint is begun in every step, so that each lands while the next is trained; then the run is stopped."""
    case = CASES[name]
    whole, halves = (recipe_of(case, store, tmp_path / part) for part in ("whole", "halves"))
    pool = ranks(case.num_ranks)
    pool.run(train_on_rank, replace(whole, checkpoint=replace(whole.checkpoint, interval=0)), None)
    pool.run(train_on_rank, halves, case.stop)
    assert [step for step, _ in step_folders(halves.run_dir)] == [case.stop - 1, case.stop]
    pool.run(train_on_rank, halves, None)
    assert course_of(halves.run_dir) == course_of(whole.run_dir)
    assert len(course_of(whole.run_dir)) == STEPS


def test_the_epochs_of_the_cases_end_where_they_should(store: Path) -> None:
    """Stops after step 4 fall inside an epoch, that of `epoch-boundary` at its end."""
    num_samples = len(Store.open(str(store)))
    assert CASES["epoch-boundary"].stop * BATCH == num_samples
    assert CASES["one"].stop * BATCH % num_samples
