"""Rows of the full length (`train.row_length: full`) give the results of rows that are as long as needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_deepstack.config.choices import Batching, RowLength
from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.planning.batch.sequence import row_lengths
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_recipe
from megatron_deepstack.testing.trial import run_trial

Pools = Callable[[int], RankPool]


def recipe_of(batching: Batching, parallel: ParallelConfig) -> Recipe:
    recipe = tiny_recipe(parallel=parallel)
    return replace(recipe, train=replace(recipe.train, batching=batching, seq_length=128, steps=2))


CASES = {
    "padded": (1, recipe_of(Batching.PADDED, ParallelConfig())),
    "packed-pp2": (2, recipe_of(Batching.PACKED, ParallelConfig(pipeline=2))),
    "packed-cp2": (2, recipe_of(Batching.PACKED, ParallelConfig(context=2))),
}


@pytest.mark.parametrize(("num_ranks", "recipe"), CASES.values(), ids=CASES)
def test_padding_changes_nothing(ranks: Pools, num_ranks: int, recipe: Recipe) -> None:
    """Losses of two steps and the first gradients; sums of other lengths are rounded differently, up to 2e-7."""
    full = replace(recipe, train=replace(recipe.train, row_length=RowLength.FULL))
    needed, padded = (ranks(num_ranks).run(run_trial, one)[0] for one in (recipe, full))
    assert needed is not None
    assert padded is not None
    assert padded.losses == pytest.approx(needed.losses, rel=1e-6)
    assert padded.gradient_norms == pytest.approx(needed.gradient_norms, rel=1e-5)


@pytest.mark.parametrize(
    ("parallel", "row_length", "expected"),
    [
        (ParallelConfig(), RowLength.NEEDED, (9, 70)),
        (ParallelConfig(), RowLength.FULL, (128, 128)),
        (ParallelConfig(pipeline=2), RowLength.FULL, (128, 128)),
        (ParallelConfig(tensor=2, sequence_parallel=True, context=2), RowLength.NEEDED, (16, 72)),
        (ParallelConfig(tensor=2, sequence_parallel=True, context=2), RowLength.FULL, (128, 128)),
    ],
)
def test_lengths_of_rows(parallel: ParallelConfig, row_length: RowLength, expected: tuple[int, ...]) -> None:
    train = replace(tiny_recipe().train, seq_length=128, row_length=row_length)
    assert row_lengths([[9, 3], [70]], parallel, train) == expected
