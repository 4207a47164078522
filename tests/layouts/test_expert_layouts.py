"""Decoders with experts (Qwen3-VL-MoE): each layout, and each sharing of experts, against one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from test_training_layouts import _compare, _one_rank, assert_same_training, rows

from megatron_deepstack.config.choices import (
    Batching,
    LoraTarget,
    Part,
    Recompute,
    RecomputeMethod,
    RecomputeModule,
)
from megatron_deepstack.config.schema import LoraConfig, ParallelConfig, Recipe
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_qwen3_vl_moe, tiny_recipe
from megatron_deepstack.testing.trial import Trial, run_trial

Pools = Callable[[int], RankPool]
MODEL = tiny_qwen3_vl_moe()
SOME = tiny_qwen3_vl_moe(dense_layers=(0, 5), tied_embeddings=True, num_experts=4, num_active_experts=1)
"""Layers without experts among the others, and one expert for each token, whose weight is 1."""

# Measured worst over all rows, float32: loss 2e-7, gradients 1.1e-6, parameters 6.1e-6.
LAYOUTS = [
    ("tp2-sp-ep2", 2, 2, ParallelConfig(tensor=2, sequence_parallel=True, expert=2), MODEL),
    ("dp2-ep2-zero", 2, 1, ParallelConfig(expert=2, distributed_optimizer=True), SOME),
    ("pp2-ep2", 4, 1, ParallelConfig(pipeline=2, expert=2), SOME),
    ("pp2", 2, 2, ParallelConfig(pipeline=2), MODEL),
    ("pp2-vpp2", 2, 1, ParallelConfig(pipeline=2, virtual_pipeline=2), SOME),
    ("tp2-sp", 2, 2, ParallelConfig(tensor=2, sequence_parallel=True), SOME),
    ("cp2-ep2", 2, 1, ParallelConfig(context=2, expert=2), MODEL),
    ("dp2-zero", 2, 1, ParallelConfig(distributed_optimizer=True), MODEL),
    ("dp2-ep2", 2, 2, ParallelConfig(expert=2), MODEL),
    ("tp2-pp2-sp-ep2", 4, 1, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True, expert=2), MODEL),
    (
        "tp2-dp2-sp-ep2-zero",
        4,
        1,
        ParallelConfig(tensor=2, sequence_parallel=True, expert=2, distributed_optimizer=True),
        MODEL,
    ),
    ("tp2-dp2-sp-ep4", 4, 1, ParallelConfig(tensor=2, sequence_parallel=True, expert=4), SOME),
    ("pp2-ep2-recompute", 4, 1, ParallelConfig(pipeline=2, expert=2, recompute=Recompute.FULL), MODEL),
    (
        "pp2-recompute-block",
        2,
        1,
        ParallelConfig(
            pipeline=2,
            recompute=Recompute.FULL,
            recompute_method=RecomputeMethod.BLOCK,
            recompute_num_layers=2,
        ),
        SOME,
    ),
    (
        "ep2-recompute-mlp",
        2,
        2,
        ParallelConfig(expert=2, recompute=Recompute.SELECTIVE, recompute_modules=(RecomputeModule.MLP,)),
        SOME,
    ),
]


@pytest.mark.parametrize(
    ("num_ranks", "batch", "parallel", "model"),
    rows(LAYOUTS, {"tp2-sp-ep2", "dp2-ep2-zero", "pp2-ep2", "pp2-recompute-block"}),
)
def test_layout_equals_one_rank(ranks: Pools, num_ranks: int, batch: int, parallel: ParallelConfig, model: Any) -> None:
    """The norm of gradients counts each expert once, and clipping follows it; the balancing loss is the same."""
    _compare(ranks, num_ranks, batch, parallel, model)


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    rows(
        [
            ("one", 1, ParallelConfig()),
            ("dp2-ep2", 2, ParallelConfig(expert=2)),
            ("tp2-sp-ep2", 2, ParallelConfig(tensor=2, sequence_parallel=True, expert=2)),
            ("cp2-ep2", 2, ParallelConfig(context=2, expert=2)),
        ],
        {"one"},
    ),
)
def test_packs_equal_padded_rows(ranks: Pools, num_ranks: int, parallel: ParallelConfig) -> None:
    """Each sample of a pack is balanced by itself, so that packing changes nothing."""
    recipe = tiny_recipe(MODEL, parallel)
    recipe = replace(recipe, train=replace(recipe.train, batching=Batching.PACKED, seq_length=64))
    assert_same_training(ranks(num_ranks).run(run_trial, recipe)[0], _one_rank(ranks, MODEL, tuple(Part)))


@pytest.mark.slow
def test_a_frozen_decoder_passes_gradients_on(ranks: Pools) -> None:
    _compare(ranks, 2, 1, ParallelConfig(expert=2), MODEL, (Part.PROJECTOR,))


@pytest.mark.slow
def test_adapters_of_attention_beside_experts(ranks: Pools) -> None:
    targets = (LoraTarget.QKV, LoraTarget.ATTENTION_OUTPUT)

    def recipe(parallel: ParallelConfig) -> Recipe:
        return replace(tiny_recipe(MODEL, parallel), lora=LoraConfig(rank=3, alpha=6.0, targets=targets))

    expected = ranks(1).run(run_trial, recipe(ParallelConfig()))[0]
    assert_same_training(ranks(2).run(run_trial, recipe(ParallelConfig(expert=2)))[0], expected)


def load_by_definition(rank: int, recipe: Recipe) -> tuple[Trial, float, float]:
    """A trial of one rank; and its balancing loss by transformers' function, and the busiest expert's share."""
    import torch
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

    from megatron_deepstack.model.layers.experts import BalancedRouter

    language, routing = recipe.model.language, BalancedRouter.routing
    calls: dict[int, list[tuple[Any, Any]]] = {}

    def watched(self: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            calls.setdefault(self.layer_number, []).append((logits.detach().flatten(0, 1), self.membership_KT))
        return routing(self, logits, *args, **kwargs)

    BalancedRouter.routing = watched  # type: ignore[method-assign]
    try:
        trial = run_trial(rank, recipe)
    finally:
        BalancedRouter.routing = routing  # type: ignore[method-assign]
    assert trial is not None
    total, num_targets, shares = 0.0, 0.0, []
    for layer, of_layer in calls.items():
        chosen = torch.zeros(language.num_experts)
        for logits, membership in of_layer:
            for belongs, scale in zip(membership[:, :-1].bool(), membership[:, -1], strict=True):
                own, targets = logits[belongs], float(scale) * int(belongs.sum()) ** 2
                balance = load_balancing_loss_func((own,), language.num_experts, language.num_active_experts)
                total += targets * float(balance) / len(calls)
                num_targets += targets if layer == min(calls) else 0.0
                chosen += own.topk(language.num_active_experts).indices.flatten().bincount(minlength=len(chosen))
        shares.append(float(chosen.max() / chosen.sum()) * language.num_active_experts)
    return trial, total / num_targets, max(shares)


@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.FULL])
@pytest.mark.parametrize("factor", [0.0, 0.001])
def test_what_is_logged_of_experts(ranks: Pools, recompute: Recompute, factor: float) -> None:
    """The balancing loss before its weight, so with a weight of 0 as well; a layer that is recomputed counts once."""
    model = replace(SOME, language=replace(SOME.language, num_active_experts=2, balance_loss=factor))
    recipe = tiny_recipe(model, ParallelConfig(recompute=recompute))
    recipe = replace(recipe, train=replace(recipe.train, steps=1))
    trial, balance, busiest = ranks(1).run(load_by_definition, recipe)[0]
    assert trial.balance_losses == pytest.approx([balance], rel=1e-6)
    assert trial.busiest_experts == pytest.approx([busiest])


def test_the_balancing_loss_reaches_the_router(ranks: Pools) -> None:
    """With a factor of 0 the router has another gradient, and the loss of the text is the same."""
    without = ranks(1).run(run_trial, tiny_recipe(tiny_qwen3_vl_moe(balance_loss=0.0)))[0]
    with_it = _one_rank(ranks, MODEL, tuple(Part))
    assert without.losses[0] == pytest.approx(with_it.losses[0], rel=1e-7)
    name = "model.layers.7.mlp.gate.weight"
    difference = (without.first_gradients[name] - with_it.first_gradients[name]).abs().max()
    assert difference > 1e-2 * with_it.first_gradients[name].abs().max()
