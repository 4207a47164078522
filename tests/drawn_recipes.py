"""Recipes drawn at random: what nobody thought of putting into a table. A number makes the same recipe again."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_deepstack.config.check import find_problems
from megatron_deepstack.config.choices import (
    Activation,
    Batching,
    EncoderPlacement,
    GridRule,
    LoraTarget,
    Part,
    Precision,
    Recompute,
    RecomputeMethod,
    RecomputeModule,
    RopeType,
    RowLength,
    Sampler,
    SaveMode,
    Switch,
    Variant,
)
from megatron_deepstack.config.schema import (
    LanguageConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    RopeScalingConfig,
    SpeedConfig,
    StackConfig,
    VisionConfig,
)
from megatron_deepstack.errors import DeepStackError
from megatron_deepstack.planning.check import check_plan, check_world
from megatron_deepstack.testing.tiny import tiny_granite, tiny_model, tiny_qwen3_vl, tiny_qwen3_vl_moe, tiny_recipe

_MODULES = (RecomputeModule.CORE_ATTENTION, RecomputeModule.MLP, RecomputeModule.LAYER_NORM)
"""The others need Transformer Engine."""


def asked_draws(variable: str, count: int) -> range:
    """The numbers of a suite's draws: its own first ones, or those that an environment variable asks for (`a:b`)."""
    first, stop = (int(number) for number in os.environ.get(variable, f"0:{count}").split(":"))
    return range(first, stop)


def drawn(number: int) -> tuple[int, Recipe]:
    """The first recipe and layout that may run, of those that a number leads to; and how many ranks they take."""
    rng = random.Random(number)
    return _with_layout(rng, _first_without_problems(lambda: _recipe(rng)))


@dataclass(frozen=True, slots=True)
class Course:
    """A run under one layout, and what reads its checkpoint under another."""

    num_ranks: int
    recipe: Recipe
    other_num_ranks: int
    other: Recipe
    """The same model and optimizer; layout, batching and speed are drawn again."""


def drawn_course(number: int) -> Course:
    """A run and a continuation of it that may both run, of those that a number leads to.

    Models vary more than those of `drawn`: towers, heads and rotary positions, which exports write down.
    """
    rng = random.Random(f"course {number}")
    recipe = _first_without_problems(lambda: _for_a_course(rng, _recipe(rng)))
    num_ranks, recipe = _with_layout(rng, recipe)
    other_num_ranks, other = _with_layout(rng, _first_without_problems(lambda: _batched_otherwise(rng, recipe)))
    return Course(num_ranks, recipe, other_num_ranks, other)


def _first_without_problems(draw: Callable[[], Recipe]) -> Recipe:
    recipe = draw()
    while find_problems(recipe):
        recipe = draw()
    return recipe


def _with_layout(rng: random.Random, recipe: Recipe) -> tuple[int, Recipe]:
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


def _for_a_course(rng: random.Random, recipe: Recipe) -> Recipe:
    train = replace(recipe.train, steps=20, precision=rng.choice((Precision.FP32, Precision.FP32, Precision.BF16)))
    mode = rng.choice(list(SaveMode))
    model = replace(_written_by_transformers(rng, recipe.model), vision=_vision(rng, recipe.model))
    model = replace(model, language=_language(rng, model))
    checkpoint = replace(recipe.checkpoint, mode=mode)
    return replace(recipe, model=model, train=train, checkpoint=checkpoint)


def _written_by_transformers(rng: random.Random, model: ModelConfig) -> ModelConfig:
    """Nine of ten whole models have stacks where transformers' model can have them; `export` refuses the others."""
    if model.variant.traits.whole_model is None or _likely(rng, 0.1):
        return model
    if model.variant is not Variant.GRANITE4_VISION:
        return replace(model, stacks=StackConfig())
    depth = max(6, model.language.num_layers)
    slots = tuple(rng.sample(range(depth), 6))
    return replace(model, language=replace(model.language, num_layers=depth), stacks=StackConfig(slots=slots))


def _language(rng: random.Random, model: ModelConfig) -> LanguageConfig:
    kind = rng.choice((RopeType.DEFAULT, *RopeType))
    scaling = RopeScalingConfig()
    if kind is not RopeType.DEFAULT:
        original = None if kind is RopeType.LINEAR else 16
        scaling = RopeScalingConfig(rope_type=kind, factor=4.0, original_max_position_embeddings=original)
    language = replace(model.language, rope_theta=rng.choice((1e4, 5e5)), rope_scaling=scaling)
    wide = language.mrope_section is None and _likely(rng, 0.3)
    return replace(language, head_dim=16) if wide else language


def _vision(rng: random.Random, model: ModelConfig) -> VisionConfig:
    depth = rng.randint(3, 5)
    if model.variant.traits.whole_model is not None:
        return replace(model.vision, num_layers=max(depth, model.vision.num_layers))
    kind, activation = rng.choice((("clip", Activation.QUICK_GELU), ("siglip", Activation.GELU_TANH)))
    return replace(
        model.vision,
        kind=kind,
        activation=activation,
        num_layers=depth,
        select_layer=rng.choice((-1, -2, -2)),
        image_size=rng.choice((16, 16, 18)),
    )


def _batched_otherwise(rng: random.Random, recipe: Recipe) -> Recipe:
    batching = rng.choice(list(Batching))
    train = replace(
        recipe.train,
        batching=batching,
        micro_batch_size=1 if batching is Batching.PACKED else rng.choice((1, 2, 4)),
        row_length=rng.choice(list(RowLength)),
    )
    return replace(recipe, train=train, speed=_speed(rng))


def _speed(rng: random.Random) -> SpeedConfig:
    either = (Switch.AUTO, Switch.NEVER)
    return SpeedConfig(
        overlap_p2p=rng.choice(either),
        overlap_param_gather=rng.choice(either),
        optimizer_fusion=rng.choice(either),
    )
