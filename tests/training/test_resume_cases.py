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
SP = ParallelConfig(tensor=2, sequence_parallel=True)
CASES = {
    "pp2-vpp2-bf16-epoch-boundary": Case(2, replace(PP2, virtual_pipeline=2), precision=Precision.BF16, stop=3),
    "dp2-zero-projector": Case(2, ZERO, trainable=(Part.PROJECTOR,)),
    "one-synchronous": Case(1, ParallelConfig(), mode=SaveMode.SYNC),
    "pp2-inline-projector": Case(
        2, replace(PP2, encoder_placement=EncoderPlacement.INLINE), trainable=(Part.PROJECTOR,)
    ),
    "cp2-bf16": Case(2, ParallelConfig(context=2), precision=Precision.BF16),
    "dp2-synchronous-epoch-boundary": Case(2, ParallelConfig(), mode=SaveMode.SYNC, stop=3),
    "pp4-packed": Case(4, ParallelConfig(pipeline=4), batching=Batching.PACKED),
    "tp2-sp-pp2-projector-language": Case(4, replace(SP, pipeline=2), trainable=(Part.PROJECTOR, Part.LANGUAGE)),
    "pp2-dp2-zero": Case(4, replace(PP2, distributed_optimizer=True)),
    "tp2-dp2-zero-bf16": Case(4, replace(ZERO, tensor=2), precision=Precision.BF16),
}
"""Every layout, placement, way of batching, set of trained parts, precision, way of saving and kind of stop is in one;
those that do not touch each other (what is trained, how it is saved, where it stops) share a case."""
QUICK = 2
"""How many of them `make test` runs."""


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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (number >= QUICK)) for number, name in enumerate(CASES)]
)
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
    """Stops after step 4 fall inside an epoch, those of the cases that say so at its end."""
    num_samples = len(Store.open(str(store)))
    at_the_end = {name for name, case in CASES.items() if case.stop * BATCH % num_samples == 0}
    assert at_the_end == {name for name in CASES if "epoch-boundary" in name} != set()
