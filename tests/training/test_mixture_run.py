"""Training on a mixture: the same in every layout, resumed bit for bit, refused with other stores or weights."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_deepstack.config.choices import Unreadable
from megatron_deepstack.config.schema import DataConfig, ParallelConfig, Recipe
from megatron_deepstack.data.store.schema import shard_path
from megatron_deepstack.errors import CheckpointError, RankError
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_recipe
from megatron_deepstack.testing.tiny_store import write_tiny_store

Pools = Callable[[int], RankPool]


def train_on_rank(rank: int, recipe: Recipe, stop_after: int | None) -> None:
    """A rank of a pool, which has joined already."""
    from megatron_deepstack.training.loop import run

    run(recipe, groups_for(recipe.parallel), stop_after)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    small = write_tiny_store(tmp_path / "small", samples=((0,), (), (1, 4), (8,)), seed=1, name="small")
    large = write_tiny_store(tmp_path / "large", seed=2, name="large")
    data = DataConfig(stores=(str(small), str(large)), weights=(3.0, 1.0))
    run = tiny_recipe(global_batch_size=4)
    return replace(run, data=data, train=replace(run.train, steps=4), run_dir=str(tmp_path / "run"))


def records(recipe: Recipe) -> list[dict]:
    return [json.loads(line) for line in (Path(recipe.run_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(recipe: Recipe) -> list[float]:
    return [record["loss"] for record in records(recipe)]


@pytest.mark.slow
def test_resumed_bit_for_bit_and_alike_in_every_layout(ranks: Pools, recipe: Recipe, tmp_path: Path) -> None:
    halves = replace(recipe, run_dir=str(tmp_path / "halves"))
    ranks(1).run(train_on_rank, recipe, None)
    ranks(1).run(train_on_rank, halves, 2)
    assert len(losses(halves)) == 2
    ranks(1).run(train_on_rank, halves, None)
    assert losses(halves) == losses(recipe)
    assert len(losses(recipe)) == 4
    for name, parallel in (("pp2", ParallelConfig(pipeline=2)), ("dp2", ParallelConfig())):
        other = replace(recipe, parallel=parallel, run_dir=str(tmp_path / name))
        ranks(2).run(train_on_rank, other, None)
        assert losses(other) == pytest.approx(losses(recipe), rel=2e-5)


def test_other_weights_or_stores_are_another_run(ranks: Pools, recipe: Recipe) -> None:
    ranks(1).run(train_on_rank, recipe, 1)
    others = {
        r"now reads .* \(weight 1\) and .* \(weight 1\), which are not the same": replace(
            recipe.data, weights=(1.0, 1.0)
        ),
        "which are not the same: other records, .* order or weights": replace(
            recipe.data, stores=recipe.data.stores[::-1]
        ),
    }
    for words, data in others.items():
        with pytest.raises((RankError, CheckpointError), match=words):
            ranks(1).run(train_on_rank, replace(recipe, data=data), None)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_sample_that_cannot_be_read_is_left_out(ranks: Pools, recipe: Recipe, tmp_path: Path, pipeline: int) -> None:
    recipe = replace(
        recipe, parallel=ParallelConfig(pipeline=pipeline), data=replace(recipe.data, unreadable=Unreadable.SKIP)
    )
    whole = replace(recipe, run_dir=str(tmp_path / "whole"))
    ranks(pipeline).run(train_on_rank, whole, None)
    shard = Path(recipe.data.stores[0]) / shard_path(0)  # type: ignore[index]
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    ranks(pipeline).run(train_on_rank, recipe, None)
    found = records(recipe)
    left_out = [name for record in found for name in record["unreadable_samples"]]
    assert left_out
    assert set(left_out) == {"small-0"}
    assert sum(record["unreadable"] for record in found) == len(left_out)
    first = next(k for k, record in enumerate(found) if record["unreadable"])
    assert losses(recipe)[:first] == losses(whole)[:first]
    assert found[first]["num_targets"] < records(whole)[first]["num_targets"]
    stopping = replace(recipe, data=replace(recipe.data, unreadable=Unreadable.STOP), run_dir=str(tmp_path / "stop"))
    with pytest.raises(RankError, match=rf"step {first + 1}, sample 'small-0' \(number 0\).*view 0 of image 0"):
        ranks(pipeline).run(train_on_rank, stopping, None)
