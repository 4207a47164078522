"""Steps of one token: the short way through the layers gives the bits of Megatron's forward, for all decoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_deepstack.config.choices import Activation, LoraTarget, Precision, RopeType
from megatron_deepstack.config.schema import LoraConfig, ModelConfig, ParallelConfig, RopeScalingConfig
from megatron_deepstack.config.traits.families import FamilyTraits, register_family
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_granite, tiny_model, tiny_qwen3_vl, tiny_qwen3_vl_moe

LLAMA = tiny_model()
NONE, ALL = LoraConfig(), LoraConfig(rank=3, alpha=5.0, targets=tuple(LoraTarget))
PROMPT, STEPS = 5, 4


def decoder(**changes: object) -> ModelConfig:
    return replace(LLAMA, language=replace(LLAMA.language, **changes))  # type: ignore[arg-type]


SCALED = RopeScalingConfig(rope_type=RopeType.YARN, factor=4.0, original_max_position_embeddings=4)
BIASED = FamilyTraits(switches={"qkv_bias": True}, activation=Activation.GELU_TANH, has_linear_biases=True)
CASES = {
    "llama": (LLAMA, NONE, Precision.FP32),
    "llama-bf16": (LLAMA, NONE, Precision.BF16),
    "llama-lora": (LLAMA, ALL, Precision.FP32),
    "one-key-head": (decoder(num_kv_heads=1), NONE, Precision.FP32),
    "qwen2-yarn": (decoder(qkv_bias=True, tied_embeddings=True, rope_scaling=SCALED), NONE, Precision.FP32),
    "qwen3": (decoder(qk_norm=True, head_dim=16, num_kv_heads=2), NONE, Precision.FP32),
    "both-switches": (decoder(qk_norm=True, qkv_bias=True), NONE, Precision.FP32),
    "biases-and-gelu": (decoder(family="of-biases", qkv_bias=True), NONE, Precision.FP32),
    "granite": (tiny_granite(), NONE, Precision.FP32),
    "qwen3-vl": (tiny_qwen3_vl(), NONE, Precision.FP32),
    "qwen3-vl-moe": (tiny_qwen3_vl_moe(), NONE, Precision.FP32),
    "qwen3-vl-moe-lora": (tiny_qwen3_vl_moe(), replace(ALL, targets=(LoraTarget.QKV,)), Precision.FP32),
}
# Measured: 0 with a head of keys for each query and no adapter; else the order of sums in the products differs, up to
# 2e-6 of the largest logit in float32.
TOLERANCE = {Precision.FP32: 1e-5, Precision.BF16: 3e-2}


def logits_both_ways(
    rank: int, model: ModelConfig, lora: LoraConfig, precision: Precision
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each step the logits of the short way and of Megatron's, of two prompts of one length and of two lengths."""
    from megatron_deepstack.inference.loading import make_ready
    from megatron_deepstack.model.build import build_model
    from megatron_deepstack.model.layers.key_value_cache import CachedStep, KeyValueCache

    register_family("of-biases", BIASED)
    built = build_model(model, ParallelConfig(), precision, groups_for(ParallelConfig()), lora)
    (chunk,) = built.chunks
    generator = torch.Generator().manual_seed(5)
    for parameter in chunk.parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data.copy_(1 + drawn if parameter.dim() == 1 else drawn)
    make_ready(built)
    short = chunk.token_layers
    assert short is not None
    tokens_BT = torch.randint(1, 60, (2, PROMPT + STEPS), generator=generator)
    axial = model.language.mrope_section is not None

    def logits(lengths: tuple[int, int], short_way: bool) -> list[np.ndarray]:
        chunk.token_layers = short if short_way else None
        cache, found = KeyValueCache(2, PROMPT + STEPS), []
        pieces = [((0, 0), PROMPT)] + [((lengths[0] + n, lengths[1] + n), 1) for n in range(STEPS)]
        for starts, width in pieces:
            tokens = torch.stack([row[at : at + width] for row, at in zip(tokens_BT, starts, strict=True)])
            wanted = torch.zeros(2, dtype=torch.int64)
            step = CachedStep.of(cache, starts, width, wanted, cp=(1, 0), dtype=built.config.params_dtype)
            at = torch.tensor(starts)[:, None] + torch.arange(width)
            with torch.no_grad():
                out = chunk(tokens, None, packs=step, positions_3BS=at.expand(3, 2, width) if axial else None)
            found.append(out.float().numpy())
        return found[1:]

    pairs = []
    for lengths in ((PROMPT, PROMPT), (PROMPT, PROMPT - 2)):
        pairs += zip(logits(lengths, True), logits(lengths, False), strict=True)
    return pairs


@pytest.mark.parametrize(("model", "lora", "precision"), CASES.values(), ids=CASES)
def test_the_short_way_computes_what_megatron_does(
    ranks: Callable[[int], RankPool], model: ModelConfig, lora: LoraConfig, precision: Precision
) -> None:
    for ours, expected in ranks(1).run(logits_both_ways, model, lora, precision)[0]:
        real = expected > np.finfo(np.float32).min / 2  # the padding of the vocabulary is far below
        worst = np.abs(ours[real] - expected[real]).max() / np.abs(expected[real]).max()
        assert worst <= TOLERANCE[precision]


def has_short_way(rank: int, parallel: ParallelConfig) -> list[bool]:
    from megatron_deepstack.inference.loading import make_ready
    from megatron_deepstack.model.build import build_model

    built = build_model(LLAMA, parallel, Precision.FP32, groups_for(parallel))
    make_ready(built)
    return [chunk.token_layers is not None for chunk in built.chunks]


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        (ParallelConfig(pipeline=2, virtual_pipeline=2), [True, True]),
        (ParallelConfig(tensor=2), [False]),
        (ParallelConfig(context=2), [False]),
    ],
    ids=["stages", "tensor", "context"],
)
def test_layers_that_ranks_share_are_megatrons(
    ranks: Callable[[int], RankPool], parallel: ParallelConfig, expected: list[bool]
) -> None:
    assert ranks(2).run(has_short_way, parallel) == [expected, expected]
