"""Decoders of transformers against ours: logits, loss and every gradient of text-only samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
from hf_models import (
    draw_samples,
    llava_model,
    make_case,
    no_gradients,
    published_weights,
    randomise,
    spare_encoder_weights,
)
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from megatron_deepstack.config.choices import RopeType
from megatron_deepstack.config.schema import LanguageConfig, ParallelConfig, RopeScalingConfig
from megatron_deepstack.testing.published.reference import check_case
from megatron_deepstack.testing.published.reference_case import ReferenceCase
from megatron_deepstack.testing.ranks import RankPool

pytestmark = pytest.mark.usefixtures("quiet_transformers")

LLAMA = LanguageConfig(
    vocab_size=61, hidden_size=32, ffn_hidden_size=48, num_layers=4, num_heads=4, norm_epsilon=1e-5, rope_theta=1e4
)
GROUPED = replace(LLAMA, num_kv_heads=2)

LINEAR = RopeScalingConfig(rope_type=RopeType.LINEAR, factor=4.0)
SHORT = RopeScalingConfig(rope_type=RopeType.LLAMA3, factor=8.0, original_max_position_embeddings=8)  # than the samples
LONG = replace(SHORT, original_max_position_embeddings=1024)
YARN = RopeScalingConfig(rope_type=RopeType.YARN, factor=4.0, original_max_position_embeddings=8, beta_fast=2.0)

# id, transformers' class, our shape, what transformers needs beyond it.
DECODERS = [
    ("llama", LlamaConfig, LLAMA, {}),
    ("llama-grouped-tied", LlamaConfig, replace(GROUPED, tied_embeddings=True), {}),
    ("mistral", MistralConfig, replace(GROUPED, rope_theta=1e6, head_dim=16), {"sliding_window": None}),
    ("qwen2", Qwen2Config, replace(GROUPED, qkv_bias=True, norm_epsilon=1e-6, rope_theta=1e6), {}),
    ("qwen2-tied", Qwen2Config, replace(GROUPED, qkv_bias=True, tied_embeddings=True), {}),
    ("qwen3", Qwen3Config, replace(GROUPED, qk_norm=True, norm_epsilon=1e-6, head_dim=16), {}),
    ("llama-linear", LlamaConfig, replace(GROUPED, rope_scaling=LINEAR), {}),
    ("llama-llama3-short", LlamaConfig, replace(GROUPED, rope_scaling=SHORT, head_dim=16), {}),
    ("llama-llama3-long", LlamaConfig, replace(GROUPED, rope_scaling=LONG, head_dim=16), {}),
    ("qwen3-yarn", Qwen3Config, replace(GROUPED, qk_norm=True, head_dim=16, rope_scaling=YARN), {}),
    ("qwen3-tied", Qwen3Config, replace(GROUPED, qk_norm=True, head_dim=16, tied_embeddings=True), {}),
]


def hf_decoder(kind: type[PretrainedConfig], language: LanguageConfig, **more: object) -> PretrainedConfig:
    """transformers' config of a decoder."""
    return kind(
        vocab_size=language.vocab_size,
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_hidden_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_heads,
        num_key_value_heads=language.num_kv_heads or language.num_heads,
        head_dim=language.head_dim or language.hidden_size // language.num_heads,
        rms_norm_eps=language.norm_epsilon,
        rope_parameters={
            name: value
            for name, value in {**asdict(language.rope_scaling), "rope_theta": language.rope_theta}.items()
            if value is not None
        },
        tie_word_embeddings=language.tied_embeddings,
        attn_implementation="sdpa",
        **more,
    )


def decoder_case(name: str, config: PretrainedConfig, language: LanguageConfig) -> ReferenceCase:
    """Two text-only samples of different lengths through transformers."""
    module = AutoModelForCausalLM.from_config(config)
    randomise(module)
    weights = {**spare_encoder_weights(language), **published_weights(module)}
    samples = draw_samples(language, images=(0, 0))
    results = [(module(input_ids=s.tokens[None]).logits[0], s.labels) for s in samples]
    case = make_case(name, llava_model(language), weights, module, samples, results)
    return replace(case, grads={**case.grads, **no_gradients(spare_encoder_weights(language))})


# Measured worst of all decoders and layouts: logits 3.9e-6, loss 9.5e-8, gradients 2.6e-6.
LAYOUTS = [
    ("one", 1, ParallelConfig()),
    ("tp2", 2, ParallelConfig(tensor=2)),
    ("pp2", 2, ParallelConfig(pipeline=2)),
]


@pytest.mark.parametrize(("num_ranks", "parallel"), [row[1:] for row in LAYOUTS], ids=[row[0] for row in LAYOUTS])
@pytest.mark.parametrize(("name", "kind", "language", "more"), DECODERS, ids=[row[0] for row in DECODERS])
def test_decoder(
    ranks: Callable[[int], RankPool],
    name: str,
    kind: type[PretrainedConfig],
    language: LanguageConfig,
    more: dict[str, object],
    num_ranks: int,
    parallel: ParallelConfig,
) -> None:
    """Also that tensor parallelism keeps groups of heads together and that stages share a tied embedding."""
    result = check_case(ranks(num_ranks), decoder_case(name, hf_decoder(kind, language, **more), language), parallel)
    assert result.passed, str(result)
