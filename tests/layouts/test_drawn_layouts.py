"""Recipes drawn at random, each against one rank: what nobody thought of putting into a table.

A fault shows itself by the number of its draw, which makes the same recipe again. To look further than the suite does:
DEEPSTACK_DRAWS=1000:1400 python -m pytest -m slow tests/layouts/test_drawn_layouts.py
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from test_training_layouts import GRADIENT_TOLERANCE, assert_same_losses, assert_same_parameters

from megatron_deepstack.config.check import find_problems
from megatron_deepstack.config.choices import (
    Batching,
    EncoderPlacement,
    GridRule,
    LoraTarget,
    Part,
    Recompute,
    RecomputeMethod,
    RecomputeModule,
    RowLength,
    Sampler,
    Switch,
    Variant,
)
from megatron_deepstack.config.schema import LoraConfig, ModelConfig, ParallelConfig, Recipe, StackConfig
from megatron_deepstack.errors import DeepStackError
from megatron_deepstack.planning.check import check_plan, check_world
from megatron_deepstack.testing.compare import worst
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_granite, tiny_model, tiny_qwen3_vl, tiny_qwen3_vl_moe, tiny_recipe
from megatron_deepstack.testing.trial import run_trial

FIRST, STOP = (int(number) for number in os.environ.get("DEEPSTACK_DRAWS", "0:24").split(":"))
NUM_SAMPLES = 12
_MODULES = (RecomputeModule.CORE_ATTENTION, RecomputeModule.MLP, RecomputeModule.LAYER_NORM)
"""The others need Transformer Engine."""


def drawn(number: int) -> tuple[int, Recipe]:
    """The first recipe and layout that may run, of those that a number leads to; and how many ranks they take."""
    rng = random.Random(number)
    recipe = _recipe(rng)
    while find_problems(recipe):
        recipe = _recipe(rng)
    while True:
        num_ranks = rng.choice((2, 2, 4, 4, 4)) if rng.random() < 0.9 else 1
        tried = replace(recipe, parallel=_layout(rng, recipe.model, num_ranks))
        if not find_problems(tried):
            try:
                check_plan(tried)
                check_world(tried, num_ranks)
            except DeepStackError:
                continue
            return num_ranks, tried


def _recipe(rng: random.Random) -> Recipe:
    batching = rng.choice(list(Batching))
    parts: tuple[tuple[Part, ...], ...] = (
        (Part.PROJECTOR,),
        (Part.LANGUAGE,),
        (Part.VISION,),
        (Part.PROJECTOR, Part.LANGUAGE),
    )
    recipe = tiny_recipe(
        _model(rng),
        trainable=rng.choice((tuple(Part),) * 4 + parts),
        global_batch_size=rng.choice((4, 8)),
        micro_batch_size=1 if batching is Batching.PACKED else rng.choice((1, 2, 4)),
    )
    row_length = rng.choice((RowLength.NEEDED, RowLength.NEEDED, RowLength.FULL))
    recipe = replace(recipe, train=replace(recipe.train, batching=batching, row_length=row_length))
    if rng.random() < 0.75:
        return recipe

    def some() -> tuple[LoraTarget, ...]:
        return tuple(rng.sample(list(LoraTarget), rng.randint(0, 4)))

    lora = LoraConfig(rank=rng.randint(2, 4), alpha=6.0, targets=some(), vision_targets=some(), projector=_likely(rng))
    return replace(recipe, lora=lora)


def _model(rng: random.Random) -> ModelConfig:
    depth = rng.choice((4, 6, 8))
    decoder: dict[str, object] = {"num_layers": depth, "tied_embeddings": _likely(rng, 0.3)}
    decoder["vocab_size"] = rng.choice((61, 64, 97))
    variant = rng.choice(list(Variant))
    if variant is Variant.QWEN3_VL:
        model = tiny_qwen3_vl(stacks=StackConfig(slots=tuple(rng.sample(range(1, depth), 2))))
    elif variant is Variant.QWEN3_VL_MOE:
        active, dense = rng.randint(1, 3), rng.choice(((), (0,), (1, 3)))
        model = tiny_qwen3_vl_moe(num_experts=rng.choice((4, 6)), num_active_experts=active, dense_layers=dense)
    elif variant is Variant.GRANITE4_VISION:
        model = tiny_granite(stacks=StackConfig(slots=_slots(rng, depth, 6)))
    else:
        decoder |= {"qkv_bias": _likely(rng), "qk_norm": _likely(rng), "num_kv_heads": rng.choice((1, 2, 4))}
        drawn_slots = StackConfig(slots=_slots(rng, depth, 4))
        sampled = StackConfig(start=rng.randint(0, 1), sampler=rng.choice(list(Sampler)), num_stacks=rng.randint(1, 3))
        model = tiny_model(variant=variant, stacks=StackConfig(start=0) if _likely(rng, 0.2) else drawn_slots)
        if variant is Variant.DEEPSTACK_L and _likely(rng):
            model = replace(model, stacks=sampled)
        if variant is Variant.DEEPSTACK_V:
            model = replace(model, stacks=StackConfig(start=0, grid=GridRule.FIXED_2X2))
    return replace(model, language=replace(model.language, **decoder))  # type: ignore[arg-type]


def _slots(rng: random.Random, depth: int, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(depth) for _ in range(count))


def _likely(rng: random.Random, probability: float = 0.4) -> bool:
    return rng.random() < probability


def _layout(rng: random.Random, model: ModelConfig, num_ranks: int) -> ParallelConfig:
    axes = [1, 1, 1, 1]
    while math.prod(axes) < num_ranks:
        axes[rng.randrange(4)] *= 2
    tensor, pipeline, context, _ = axes
    cuts = sorted(rng.randint(0, model.language.num_layers) for _ in range(pipeline - 1))
    uneven = tuple(stop - first for first, stop in zip((0, *cuts), (*cuts, model.language.num_layers), strict=True))
    return ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        expert=rng.choice((1, 2, 4)) if model.language.num_experts else 1,
        sequence_parallel=tensor > 1 and (bool(model.language.num_experts) or _likely(rng, 0.6)),
        virtual_pipeline=2 if pipeline > 1 and _likely(rng) else 1,
        layers_per_stage=uneven if pipeline > 1 and _likely(rng, 0.25) else None,
        encoder_placement=rng.choice((EncoderPlacement.SPREAD, EncoderPlacement.SPREAD, EncoderPlacement.INLINE)),
        encoder_chunk_views=rng.choice((0, 0, 1, 2)),
        rows_on_host=rng.choice((Switch.NEVER, Switch.ALWAYS)),
        distributed_optimizer=_likely(rng),
        overlap_grad_reduce=_likely(rng, 0.7),
        recompute=rng.choice((Recompute.NONE, *Recompute)),
        recompute_method=rng.choice(list(RecomputeMethod)),
        recompute_num_layers=rng.randint(1, 3),
        recompute_modules=tuple(rng.sample(_MODULES, 2)),
        offload_layers=rng.choice((0, 0, 1, 2, 9)),
        offload_above_mib=0.001,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", range(FIRST, STOP))
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
