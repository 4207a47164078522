"""`LlavaForConditionalGeneration` against ours: towers, projector and decoders together, an image inside the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hf_models import (
    CLIP,
    SIGLIP,
    draw_samples,
    hf_tower,
    llava_model,
    make_case,
    published_weights,
    randomise,
)
from test_decoders import GROUPED, LLAMA, hf_decoder
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PretrainedConfig, Qwen3Config

from megatron_deepstack.config.schema import LanguageConfig, ParallelConfig, VisionConfig
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_deepstack.planning.exchange.rows import tokens_per_view
from megatron_deepstack.testing.oracle.model import OracleSample
from megatron_deepstack.testing.published.reference import check_case
from megatron_deepstack.testing.published.reference_case import ReferenceCase
from megatron_deepstack.testing.ranks import RankPool

pytestmark = pytest.mark.usefixtures("quiet_transformers")

# id, decoder of transformers, our decoder, our tower.
MODELS = [
    ("clip-llama", LlamaConfig, LLAMA, CLIP),
    ("siglip-qwen3", Qwen3Config, replace(GROUPED, qk_norm=True, head_dim=16, tied_embeddings=True), SIGLIP),
]
# Measured worst: logits 2.9e-6, loss 6.6e-8, gradients 5.7e-6 (float64 transformers, float32 ours).
LAYOUTS = [
    ("one", 1, 1, ParallelConfig()),
    ("one-batch2", 1, 2, ParallelConfig()),
    ("pp2", 2, 1, ParallelConfig(pipeline=2)),
]


def expanded(sample: OracleSample, num_tokens: int, image_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels as transformers takes them: the placeholder repeated."""
    repeats = torch.where(sample.tokens == IMAGE_TOKEN_ID, num_tokens, 1)
    tokens = sample.tokens.repeat_interleave(repeats)
    labels = sample.labels.repeat_interleave(repeats).masked_fill(tokens == IMAGE_TOKEN_ID, IGNORE_INDEX)
    return tokens.masked_fill(tokens == IMAGE_TOKEN_ID, image_token), labels


def llava_case(
    name: str, kind: type[PretrainedConfig], language: LanguageConfig, vision: VisionConfig
) -> ReferenceCase:
    """An image sample, a text-only one and another image sample. Token 0 stands for images, as no text holds it."""
    config = LlavaConfig(
        text_config=hf_decoder(kind, language),
        vision_config=hf_tower(vision),
        image_token_index=0,
        vision_feature_select_strategy="default" if vision.kind == "clip" else "full",
        tie_word_embeddings=language.tied_embeddings,
        attn_implementation="sdpa",
    )
    module = LlavaForConditionalGeneration(config)
    randomise(module)
    samples = draw_samples(language, images=(1, 0, 1), vision=vision)
    results = []
    for sample in samples:
        tokens, labels = expanded(sample, tokens_per_view(vision), image_token=0)
        pixels = None if sample.pixel_values is None else sample.pixel_values.double()
        results.append((module(input_ids=tokens[None], pixel_values=pixels).logits[0], labels))
    return make_case(name, llava_model(language, vision), published_weights(module), module, samples, results)


@pytest.mark.parametrize(
    ("num_ranks", "batch", "parallel"), [row[1:] for row in LAYOUTS], ids=[row[0] for row in LAYOUTS]
)
@pytest.mark.parametrize(("name", "kind", "language", "vision"), MODELS, ids=[row[0] for row in MODELS])
def test_llava(
    ranks: Callable[[int], RankPool],
    name: str,
    kind: type[PretrainedConfig],
    language: LanguageConfig,
    vision: VisionConfig,
    num_ranks: int,
    batch: int,
    parallel: ParallelConfig,
) -> None:
    """Logits, loss and every gradient, those of tower and projector included."""
    result = check_case(ranks(num_ranks), llava_case(name, kind, language, vision), parallel, batch)
    assert result.passed, str(result)
