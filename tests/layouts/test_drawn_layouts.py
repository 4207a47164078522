"""Recipes drawn at random, each against one rank: what nobody thought of putting into a table.

A fault shows itself by the number of its draw, which makes the same recipe again. To look further than the suite does:
DEEPSTACK_DRAWS=1000:1400 python -m pytest -m slow tests/layouts/test_drawn_layouts.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from drawn_recipes import asked_draws, drawn
from test_training_layouts import GRADIENT_TOLERANCE, assert_same_losses, assert_same_parameters

from megatron_deepstack.config.choices import Batching, RowLength
from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.testing.compare import worst
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.trial import run_trial

NUM_SAMPLES = 12


@pytest.mark.slow
@pytest.mark.parametrize("number", asked_draws("DEEPSTACK_DRAWS", 24))
def test_a_drawn_recipe_equals_one_rank(ranks: Callable[[int], RankPool], number: int) -> None:
    num_ranks, recipe = drawn(number)
    plain = replace(recipe.train, micro_batch_size=1, batching=Batching.PADDED, row_length=RowLength.NEEDED)
    alone = replace(recipe, parallel=ParallelConfig(), train=plain)
    expected, actual = (
        ranks(count).run(run_trial, one, NUM_SAMPLES, number)[0] for count, one in ((1, alone), (num_ranks, recipe))
    )
    what = f"draw {number} on {num_ranks} ranks: {recipe}"
    assert_same_losses(actual, expected)
    assert actual.gradient_norms == pytest.approx(expected.gradient_norms, rel=GRADIENT_TOLERANCE), what
    if not recipe.parallel.distributed_optimizer:
        error, name = worst(actual.first_gradients, expected.first_gradients)
        assert error <= GRADIENT_TOLERANCE, f"gradient of {name}; {what}"
    assert_same_parameters(actual, expected)
