"""Experts in grouped products: the same training, tensors and checkpoints as experts one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from grouped_stand_in import with_grouped
from test_resharding import load_and_save, train_and_save
from trained_rank import differing, plain_tensors, saving_recipe

from megatron_deepstack.config.choices import Recompute, RecomputeModule
from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.testing.compare import worst
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_qwen3_vl_moe, tiny_recipe
from megatron_deepstack.testing.trial import run_trial

Pools = Callable[[int], RankPool]
MODEL = tiny_qwen3_vl_moe()
SOME = tiny_qwen3_vl_moe(dense_layers=(0, 5), num_experts=4)
LAYOUTS = {
    "one": (1, ParallelConfig()),
    "ep2": (2, ParallelConfig(expert=2)),
    "tp2-sp-ep2": (2, ParallelConfig(tensor=2, sequence_parallel=True, expert=2)),
    "ep2-zero": (2, ParallelConfig(expert=2, distributed_optimizer=True)),
}


@pytest.mark.parametrize("layout", ["one", pytest.param("tp2-sp-ep2", marks=pytest.mark.slow)])
def test_grouped_experts_train_as_single_ones(ranks: Pools, layout: str) -> None:
    """Published names and gradients of a rank's parameters, which are weight0, weight1, ... of one module."""
    num_ranks, parallel = LAYOUTS[layout]
    recipe = tiny_recipe(MODEL, parallel)
    single = ranks(num_ranks).run(run_trial, recipe)[0]
    grouped = ranks(num_ranks).run(with_grouped, run_trial, recipe)[0]
    assert grouped.losses == pytest.approx(single.losses, rel=1e-6)
    assert worst(grouped.first_gradients, single.first_gradients)[0] <= 1e-6
    assert worst(grouped.parameters, single.parameters)[0] <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("modules", [("moe_act",), ("moe_act", "layernorm"), ("moe_act", "mlp")], ids="-".join)
def test_the_activation_of_experts_can_be_computed_again(ranks: Pools, modules: tuple[str, ...]) -> None:
    recipe = tiny_recipe(SOME)
    again = replace(
        recipe.parallel, recompute=Recompute.SELECTIVE, recompute_modules=tuple(map(RecomputeModule, modules))
    )
    kept = ranks(1).run(with_grouped, run_trial, recipe)[0]
    made = ranks(1).run(with_grouped, run_trial, replace(recipe, parallel=again))[0]
    assert made.losses == kept.losses
    assert worst(made.first_gradients, kept.first_gradients)[0] == 0
    assert worst(made.parameters, kept.parameters)[0] == 0


@pytest.mark.parametrize("layout", ["ep2", pytest.param("ep2-zero", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", [MODEL, pytest.param(SOME, marks=pytest.mark.slow)], ids=["all", "some"])
def test_checkpoints_of_grouped_and_single_experts_are_one(
    ranks: Pools, tmp_path: Path, model: object, layout: str
) -> None:
    """Written by one kind, read and written again by the other, and back."""
    num_ranks, parallel = LAYOUTS[layout]
    recipes = [saving_recipe(tmp_path / str(number), parallel, model=model) for number in range(3)]
    pool = ranks(num_ranks)
    first, _ = pool.run(train_and_save, recipes[0])[0]
    second, loss = pool.run(with_grouped, load_and_save, recipes[1], first)[0]
    third, again = pool.run(load_and_save, recipes[2], second)[0]
    one, two, three = (ranks(1).run(plain_tensors, str(path))[0] for path in (first, second, third))
    assert any(name.startswith("decoder.") and "experts.linear_fc1.weight" in name for name in one)
    assert differing(two, one) == differing(three, one) == []
    assert again == pytest.approx(loss, rel=1e-6)
