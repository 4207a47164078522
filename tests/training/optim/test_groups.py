"""Groups of parameters: each parameter once, whatever the layout, with the rates of its part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_deepstack.config.choices import Part, Precision
from megatron_deepstack.config.schema import LanguageConfig, LoraConfig, OptimizerConfig, ParallelConfig, Recipe
from megatron_deepstack.testing.compare import gather_published
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_model, tiny_qwen3_vl_moe, tiny_recipe
from megatron_deepstack.training.optim.groups import ParameterGroup, group_table

Pools = Callable[[int], RankPool]
RATES = OptimizerConfig(
    lr=1e-2,
    vision_lr=5e-3,
    projector_lr=2e-2,
    weight_decay=0.1,
    vision_weight_decay=0.0,
    projector_weight_decay=0.3,
    warmup_fraction=0.0,
)


def optimizer_on_rank(recipe: Recipe) -> tuple[object, object, object]:
    from megatron_deepstack.model.build import build_model, fill_model, freeze
    from megatron_deepstack.model.init import random_source
    from megatron_deepstack.step.engine import build_engine
    from megatron_deepstack.training.optim.optimizer import Optimizer

    groups = groups_for(recipe.parallel)
    model = build_model(recipe.model, recipe.parallel, recipe.train.precision, groups, recipe.lora)
    fill_model(model, random_source(recipe.model, recipe.train.seed), groups.decoder.tp)
    freeze(model, recipe.train.trainable)
    engine = build_engine(model, recipe.model, recipe.parallel, groups)
    return engine, Optimizer(engine, recipe.optimizer, recipe.train.precision, recipe.train.steps), groups


def groups_of(rank: int, recipe: Recipe) -> tuple[ParameterGroup, ...]:
    return optimizer_on_rank(recipe)[1].groups  # type: ignore[attr-defined, no-any-return]


def step_without_gradients(rank: int, recipe: Recipe) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Published parameters before and after a step in which weight decay alone moves them."""
    engine, optimizer, groups = optimizer_on_rank(recipe)
    model = engine.model  # type: ignore[attr-defined]
    before = gather_published(model, groups, lambda parameter: parameter.clone())  # type: ignore[arg-type]
    for ddp in engine.wrapped:  # type: ignore[attr-defined]
        ddp.zero_grad_buffer()
    optimizer.step(0)  # type: ignore[attr-defined]
    return before, gather_published(model, groups, lambda parameter: parameter)  # type: ignore[arg-type]


TIED = LanguageConfig(
    vocab_size=61, hidden_size=32, ffn_hidden_size=48, num_layers=8, num_heads=4, tied_embeddings=True
)
LAYOUTS = [
    ("pp2", 2, ParallelConfig(pipeline=2)),
    ("pp2-vpp2", 2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    ("tp2-sp", 2, ParallelConfig(tensor=2, sequence_parallel=True)),
    ("dp2-zero", 2, ParallelConfig(distributed_optimizer=True)),
    ("cp2", 2, ParallelConfig(context=2)),
]
MODELS = {
    "plain": tiny_recipe(),
    "tied": tiny_recipe(tiny_model(language=TIED)),
    "lora": replace(tiny_recipe(trainable=(Part.PROJECTOR, Part.LANGUAGE)), lora=LoraConfig(rank=2)),
    "bf16": tiny_recipe(precision=Precision.BF16),
}


@pytest.mark.parametrize("recipe", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("num_ranks", "parallel"), [row[1:] for row in LAYOUTS], ids=[row[0] for row in LAYOUTS])
def test_groups_are_the_same_in_every_layout(
    ranks: Pools, num_ranks: int, parallel: ParallelConfig, recipe: Recipe
) -> None:
    expected = ranks(1).run(groups_of, recipe)[0]
    for found in ranks(num_ranks).run(groups_of, replace(recipe, parallel=parallel)):
        assert found == expected


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        (2, ParallelConfig(expert=2)),
        (2, ParallelConfig(tensor=2, sequence_parallel=True, expert=2)),
        (2, ParallelConfig(tensor=2, sequence_parallel=True)),
        (2, ParallelConfig(pipeline=2)),
    ],
    ids=["ep2", "tp2-sp-ep2", "tp2-sp", "pp2"],
)
def test_each_expert_counts_once(ranks: Pools, num_ranks: int, parallel: ParallelConfig) -> None:
    recipe = tiny_recipe(tiny_qwen3_vl_moe(dense_layers=(0,), num_experts=4))
    expected = ranks(1).run(groups_of, recipe)[0]
    for found in ranks(num_ranks).run(groups_of, replace(recipe, parallel=parallel)):
        assert found == expected


def test_groups_hold_every_parameter_once(ranks: Pools) -> None:
    """By hand: a decoder of 8 layers 32 wide with its vocabulary padded to 128, a ViT of 3 layers 24 wide, a projector.

    The ViT's feature is what enters its last layer, which therefore never learns.
    """
    recipe = replace(tiny_recipe(), optimizer=RATES)
    found = {(group.part, group.shape): group for group in ranks(1).run(groups_of, recipe)[0]}
    decoder = 8 * (4 * 32 * 32 + 3 * 32 * 48) + 2 * 128 * 32
    vit = 2 * (4 * 24 * 24 + 2 * 24 * 48) + 3 * 4 * 4 * 24 + 17 * 24
    projector = 24 * 32 + 32 * 32
    assert {kind: group.num_parameters for kind, group in found.items()} == {
        (Part.LANGUAGE, "matrices"): decoder,
        (Part.LANGUAGE, "vectors"): 8 * 2 * 32 + 32,
        (Part.VISION, "matrices"): vit,
        (Part.VISION, "vectors"): 2 * (4 * 24 + (24 * 4) + 48 + 24) + 24 + 2 * 24,
        (Part.PROJECTOR, "matrices"): projector,
        (Part.PROJECTOR, "vectors"): 32 + 32,
    }
    rates = {kind: (group.peak_lr, group.weight_decay) for kind, group in found.items()}
    assert rates == {
        (Part.LANGUAGE, "matrices"): (1e-2, 0.1),
        (Part.LANGUAGE, "vectors"): (1e-2, 0.0),
        (Part.VISION, "matrices"): (5e-3, 0.0),
        (Part.VISION, "vectors"): (5e-3, 0.0),
        (Part.PROJECTOR, "matrices"): (2e-2, 0.3),
        (Part.PROJECTOR, "vectors"): (2e-2, 0.0),
    }


def test_a_frozen_part_has_no_group(ranks: Pools) -> None:
    (matrices, vectors) = ranks(1).run(groups_of, tiny_recipe(trainable=(Part.PROJECTOR,)))[0]
    assert (matrices.part, matrices.shape, vectors.part, vectors.shape) == (
        Part.PROJECTOR,
        "matrices",
        Part.PROJECTOR,
        "vectors",
    )


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(pipeline=2), ParallelConfig(distributed_optimizer=True)], ids=["pp2", "dp2-zero"]
)
def test_each_part_decays_at_its_own_rate(ranks: Pools, parallel: ParallelConfig) -> None:
    """Without gradients Adam moves nothing, and decoupled decay multiplies matrices by 1 - lr x decay."""
    recipe = replace(tiny_recipe(parallel=parallel), optimizer=RATES)
    before, after = ranks(2).run(step_without_gradients, recipe)[0]
    assert before.keys() == after.keys()
    assert {True, False} == {"mm_projector" in name for name in before}
    for name, value in before.items():
        factor = 1.0
        if value.dim() > 1 and "mm_projector" in name:
            factor = 1 - 2e-2 * 0.3
        elif value.dim() > 1 and "vision_tower" not in name:
            factor = 1 - 1e-2 * 0.1
        torch.testing.assert_close(after[name], factor * value, rtol=1e-6, atol=0.0)


def test_the_table_has_a_line_a_group_and_their_sum() -> None:
    groups = (
        ParameterGroup(Part.PROJECTOR, "matrices", 1_234_567, 1e-3, 0.05),
        ParameterGroup(Part.LANGUAGE, "vectors", 89, 2e-5, 0.0),
    )
    assert group_table(groups) == [
        "part                       parameters  peak lr  weight decay",
        "projector        matrices   1,234,567    0.001          0.05",
        "language         vectors           89    2e-05             0",
        "all that learns             1,234,656",
    ]
