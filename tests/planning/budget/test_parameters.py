"""Numbers of parameters are exact: every family, tower and projector, built under every kind of layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_deepstack.config.architectures import LANGUAGE, VISION
from megatron_deepstack.config.choices import (
    Activation,
    GradientDtype,
    LoraTarget,
    MomentDtype,
    Part,
    Precision,
    Variant,
)
from megatron_deepstack.config.schema import (
    LanguageConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    QFormerConfig,
    StackConfig,
    VisionConfig,
)
from megatron_deepstack.planning.budget.cost import decoder_flops
from megatron_deepstack.planning.budget.footprint import lasting_bytes, rank_bytes
from megatron_deepstack.planning.budget.parameters import (
    active_parameters,
    encoder_parameters,
    model_parameters,
    parameters_of_stages,
)
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_model, tiny_qwen3_vl, tiny_qwen3_vl_moe, tiny_recipe

Pools = Callable[[int], RankPool]
Counts = tuple[int, list[int], list[int]]
Case = tuple[ParallelConfig, LoraConfig, tuple[Part, ...]]
TWO_TAPS = {
    "kind": "siglip", "taps": (1, 1, 2), "select_layer": -2, "tile_grids": ("2x2", "1x2"),
    "hidden_size": 24, "ffn_hidden_size": 40, "num_layers": 4, "num_heads": 3,
}  # fmt: skip
"""The tower of the model with Q-Formers."""


def counted(rank: int, model: ModelConfig, cases: list[Case]) -> list[Counts]:
    """Of each case the rank's stage, and all and learned parameters of its decoder and encoder."""
    from megatron_deepstack.model.build import build_model, freeze
    from megatron_deepstack.testing.ranks import groups_for

    found = []
    for parallel, lora, trainable in cases:
        groups, recipe = groups_for(parallel), tiny_recipe(model, parallel)
        built = build_model(model, parallel, recipe.train.precision, groups, lora)
        freeze(built, trainable)
        parts = [[p for chunk in built.chunks for p in chunk.parameters()], list(built.encoder.parameters())]
        everything = [sum(p.numel() for p in part) for part in parts]
        learned = [sum(p.numel() for p in part if p.requires_grad) for part in parts]
        found.append((groups.place.pp, everything, learned))
    return found


def decoder(**changes: object) -> LanguageConfig:
    sizes = {"vocab_size": 61, "hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 8, "num_heads": 4}
    return LanguageConfig(**{**sizes, "num_kv_heads": 2, **changes})  # type: ignore[arg-type]


FAMILIES = {
    "llama": decoder(family="llama", num_kv_heads=None),
    "mistral": decoder(family="mistral"),
    "qwen2": decoder(family="qwen2", qkv_bias=True),
    "qwen3": decoder(family="qwen3", qk_norm=True, head_dim=12),
    "bias-and-norm-tied": decoder(qkv_bias=True, qk_norm=True, tied_embeddings=True),
}
QFORMERS = tiny_model(
    variant=Variant.GRANITE4_VISION,
    vision=VisionConfig(image_size=32, patch_size=4, **TWO_TAPS),  # type: ignore[arg-type]
    language=decoder(family="granite", embedding_multiplier=6.0, logits_scaling=3.0),
    stacks=StackConfig(slots=(0, 3, 5)),
    qformer=QFormerConfig(
        query_side=2, window_side=4, num_sampled=2, num_layers=3, num_heads=3, ffn_hidden_size=40,
        cross_attention_interval=2, activation=Activation.GELU,
    ),
)  # fmt: skip
MODELS: dict[str, ModelConfig] = {
    **{name: tiny_model(language=language) for name, language in FAMILIES.items()},
    **{
        str(variant): tiny_model(variant=variant, stacks=StackConfig(start=0 if variant.stacks_in_vit else 1))
        for variant in Variant
        if variant.traits.whole_model is None
    },
    "siglip": tiny_model(
        vision=VisionConfig(
            kind="siglip", image_size=16, patch_size=4, hidden_size=24, ffn_hidden_size=48, num_layers=3, num_heads=2
        )
    ),
    "qwen3_vl": tiny_qwen3_vl(),
    "qwen3_vl-tied": tiny_qwen3_vl(language=replace(tiny_qwen3_vl().language, tied_embeddings=True)),
    "granite4_vision": QFORMERS,
}
LAYOUTS = {
    1: [ParallelConfig()],
    2: [
        ParallelConfig(tensor=2),
        ParallelConfig(pipeline=2, layers_per_stage=(3, 5)),
        ParallelConfig(pipeline=2, virtual_pipeline=2),
        ParallelConfig(context=2),
    ],
}


QUICK = ("bias-and-norm-tied", "deepstack_hd", "qwen3_vl", "granite4_vision")
CASES = [
    pytest.param(name, num_ranks, id=f"{name}-{num_ranks}", marks=[pytest.mark.slow] * (name not in QUICK))
    for name in MODELS
    for num_ranks in LAYOUTS
]


@pytest.mark.parametrize(("name", "num_ranks"), CASES)
def test_parameters_of_each_rank_are_exact(ranks: Pools, name: str, num_ranks: int) -> None:
    """Whole and with adapters, everything learned and only one part."""
    model = MODELS[name]
    cases = [
        (parallel, lora, trainable)
        for parallel in LAYOUTS[num_ranks]
        for lora, trainable in (
            (LoraConfig(), tuple(Part)),
            (LoraConfig(rank=3), (Part.LANGUAGE, Part.VISION)),
            (LoraConfig(), (Part.PROJECTOR,)),
            (LoraConfig(rank=3, vision_targets=tuple(LoraTarget), projector=True), tuple(Part)),
        )
    ]
    for found in ranks(num_ranks).run(counted, model, cases):
        for (stage, everything, learned), (parallel, lora, trainable) in zip(found, cases, strict=True):
            recipe = replace(tiny_recipe(model, parallel, trainable=trainable), lora=lora)
            held = [parameters_of_stages(recipe)[stage], encoder_parameters(recipe)]
            assert everything == [one.total for one in held], (stage, parallel, lora)
            assert learned == [one.learned for one in held], (stage, parallel, trainable)


WITH_EXPERTS = tiny_qwen3_vl_moe(dense_layers=(0, 5), num_experts=4)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_parameters_of_experts_are_exact(ranks: Pools, num_ranks: int) -> None:
    """Whole experts on the ranks that hold them, the router on all; layers without experts among the others."""
    layouts = [
        ParallelConfig(expert=2),
        ParallelConfig(tensor=2, sequence_parallel=True, expert=2),
        ParallelConfig(tensor=2, sequence_parallel=True),
        ParallelConfig(pipeline=2, layers_per_stage=(3, 5)),
    ]
    cases = [(parallel, LoraConfig(), tuple(Part)) for parallel in (layouts if num_ranks == 2 else [ParallelConfig()])]
    for found in ranks(num_ranks).run(counted, WITH_EXPERTS, cases):
        for (stage, everything, learned), (parallel, _, _) in zip(found, cases, strict=True):
            held = parameters_of_stages(tiny_recipe(WITH_EXPERTS, parallel))[stage]
            assert (everything[0], learned[0]) == (held.total, held.learned), (stage, parallel)
            with_experts = 6 if parallel.pipeline == 1 else (2, 4)[stage]
            assert held.experts == held.experts_learned == with_experts * 4 // parallel.expert * 3 * 32 * 20


NAMED = {"qwen3_vl_30b_a3b": (30.53, 3.35), "qwen3_vl_235b_a22b": (235.09, 22.19)}
"""Billions of parameters of the decoder: all, and those that a token passes."""


@pytest.mark.parametrize("name", NAMED)
def test_active_parameters_are_those_that_a_token_passes(name: str) -> None:
    model = ModelConfig(variant=Variant.QWEN3_VL_MOE, vision=VISION[name], language=LANGUAGE[name])
    language, parts = model.language, model_parameters(model)
    active = active_parameters(model) - parts[Part.VISION] - parts[Part.PROJECTOR]
    assert (parts[Part.LANGUAGE] / 1e9, active / 1e9) == pytest.approx(NAMED[name], abs=0.01)
    length, table = 1000, language.vocab_size * language.hidden_size
    attention = language.num_layers * length * 128 * language.num_heads
    per_token = decoder_flops(language, length) / length / 2
    assert per_token == pytest.approx(active - table + attention, rel=1e-3)  # a token is looked up, not multiplied


def test_the_whole_model_has_the_parameters_of_one_rank_without_padding() -> None:
    for name, model in MODELS.items():
        recipe, parts = tiny_recipe(model), model_parameters(model)
        tables = 1 if model.language.tied_embeddings else 2
        padding = tables * (128 - 61) * model.language.hidden_size
        assert parts[Part.LANGUAGE] == parameters_of_stages(recipe)[0].total - padding, name
        assert parts[Part.VISION] + parts[Part.PROJECTOR] == encoder_parameters(recipe).total, name


@pytest.mark.parametrize("name", ["qwen3_vl", "granite4_vision", "llama"])
def test_what_a_launch_asks_for_is_what_the_fullest_stage_keeps(name: str) -> None:
    recipe = tiny_recipe(MODELS[name], ParallelConfig(pipeline=2, layers_per_stage=(3, 5)))
    both = lasting_bytes(recipe, 2)
    assert rank_bytes(recipe, 2) == max(one.total for one in both)
    for stage, one in enumerate(both):
        held = parameters_of_stages(recipe)[stage].total + encoder_parameters(recipe).total
        assert one.weights == 4 * held


@pytest.mark.parametrize(
    ("overrides", "per_parameter"),
    [({}, 4 + 12), ({"moment_dtype": "bf16"}, 4 + 8), ({"gradient_dtype": "bf16"}, 2 + 12)],
    ids=["float32", "bf16-moments", "bf16-gradients"],
)
def test_bytes_of_gradients_and_states(overrides: dict[str, str], per_parameter: int) -> None:
    """Of each parameter that learns, beside its weight; the states are shared by the replicas."""
    recipe = tiny_recipe(parallel=ParallelConfig(distributed_optimizer=True), precision=Precision.BF16)
    if "moment_dtype" in overrides:
        recipe = replace(recipe, optimizer=replace(recipe.optimizer, moment_dtype=MomentDtype.BF16))
    if "gradient_dtype" in overrides:
        recipe = replace(recipe, speed=replace(recipe.speed, gradient_dtype=GradientDtype.BF16))
    learned = parameters_of_stages(recipe)[0].learned + encoder_parameters(recipe).learned
    alone, shared = lasting_bytes(recipe, 1)[0], lasting_bytes(recipe, 2)[0]
    assert alone.gradients + alone.optimizer == learned * per_parameter
    assert abs(2 * shared.optimizer - alone.optimizer) < 32
    assert shared.gradients == alone.gradients
