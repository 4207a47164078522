"""Tiny folders of transformers' whole multimodal models, with weights that leave nothing at its default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3VLConfig, Qwen3VLForConditionalGeneration

TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}


def qwen3_vl(folder: Path, *, tied: bool = False, text: dict[str, Any] | None = None, **vision: Any) -> Path:
    """Write a Qwen3-VL of four layers; `text` and `vision` change its config."""
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]},
            **(text or {}),
        },
        vision_config={
            "depth": 4,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_heads": 3,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 20,
            "deepstack_visual_indexes": [0, 2],
            **vision,
        },
        tie_word_embeddings=tied,
        **TOKENS,
    )
    return _write(Qwen3VLForConditionalGeneration(config), folder)


def _write(module: PreTrainedModel, folder: Path) -> Path:
    """Norms around 1, everything else normal, biases included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.split(".")[-2] and name.endswith("weight")
            scale = 0.3 if is_norm or parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(drawn * scale + float(is_norm))
    module.save_pretrained(folder)
    return folder
