"""Models that are exported under Hugging Face's names for several tests, and how transformers loads such a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_deepstack.config.choices import GridRule, Sampler, Variant
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, StackConfig, VisionConfig
from megatron_deepstack.model.published_shapes import published_shapes
from megatron_deepstack.testing.tiny_data import draw_photo

VISION = VisionConfig(image_size=16, patch_size=4, hidden_size=24, ffn_hidden_size=48, num_layers=5, num_heads=2)
LANGUAGE = LanguageConfig(vocab_size=400, hidden_size=32, ffn_hidden_size=48, num_layers=6, num_heads=4, num_kv_heads=2)
MODEL = ModelConfig(vision=VISION, language=LANGUAGE)
SIGLIP = replace(VISION, kind="siglip", image_size=18)
VIT_STACKS = StackConfig(grid=GridRule.FIXED_2X2, start=1)
MODELS = {
    "l": MODEL,
    "l-1d-deep": replace(MODEL, stacks=StackConfig(sampler=Sampler.SEQUENTIAL_1D, num_stacks=3, slots=(5, 0, 5))),
    "l-siglip-qwen2": replace(MODEL, vision=SIGLIP, language=replace(LANGUAGE, qkv_bias=True, tied_embeddings=True)),
    "v": replace(MODEL, variant=Variant.DEEPSTACK_V, stacks=VIT_STACKS),
    "hd": replace(MODEL, variant=Variant.DEEPSTACK_HD),
    "hd-grid-qwen3": replace(
        MODEL,
        variant=Variant.DEEPSTACK_HD,
        language=replace(LANGUAGE, qk_norm=True),
        stacks=StackConfig(sampler=Sampler.GRID, interval=0),
    ),
    "anyres": replace(MODEL, variant=Variant.LLAVA_ANYRES),
    "llava": replace(MODEL, variant=Variant.LLAVA),
    "in-sequence": replace(MODEL, variant=Variant.IN_SEQUENCE),
}
PHOTOS = [draw_photo(50, 40, 1), draw_photo(70, 20, 2), draw_photo(16, 16, 3)]

Folder = Callable[[str], Path]
"""A function that gives the exported folder of a model of `MODELS`."""


def drawn_weights(model: ModelConfig) -> dict[str, Tensor]:
    """Weights of ordinary size, biases and norms too."""
    generator = torch.Generator().manual_seed(11)
    weights = {}
    for name, shape in published_shapes(model).items():
        noise = torch.randn(shape, generator=generator)
        is_norm = "norm" in name and name.endswith("weight")
        weights[name] = 1 + 0.1 * noise if is_norm else noise * (0.15 if len(shape) > 1 else 0.1)
    return weights


def load(path: Path, **options: Any) -> tuple[Any, Any]:
    """Model and processor of a folder, by transformers; all weights must be used, and none be missing."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, report = AutoModelForImageTextToText.from_pretrained(
        path, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval(), AutoProcessor.from_pretrained(path, trust_remote_code=True)
