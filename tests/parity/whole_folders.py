"""Tiny folders of transformers' whole multimodal models, with weights that leave nothing at its default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

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


def qwen3_vl_moe(
    folder: Path, *, tied: bool = False, transposed: bool = False, text: dict[str, Any] | None = None, **vision: Any
) -> Path:
    """Write a Qwen3-VL-MoE of four layers; `transposed` in the form of the published folders."""
    config = Qwen3VLMoeConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 20,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.5,
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
    _write(Qwen3VLMoeForConditionalGeneration(config), folder)
    if transposed:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        stacks = {name: tensor.transpose(1, 2).contiguous() for name, tensor in tensors.items() if "experts." in name}
        save_file({**tensors, **stacks}, file, metadata={"format": "pt"})
    return folder


def _write(module: PreTrainedModel, folder: Path) -> Path:
    """Norms around 1, everything else normal, biases included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.split(".")[-2] and name.endswith("weight")
            inputs = parameter.shape[-1] if ".experts." in name else parameter[0].numel()
            scale = 0.3 if is_norm or parameter.ndim < 2 else inputs**-0.5
            parameter.copy_(drawn * scale + float(is_norm))
    module.save_pretrained(folder)
    return folder


def granite4_vision(
    folder: Path,
    *,
    tied: bool = False,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """Write a Granite 4 Vision of twelve layers whose eight stacks reach each of four stages."""
    config = Granite4VisionConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 12,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.35,
            "logits_scaling": 3.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            **(text or {}),
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            **(vision or {}),
        },
        **{
            "image_token_index": 60,
            "tie_word_embeddings": tied,
            "vision_feature_select_strategy": "full",
            "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]],
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-4, 9], [-3, 6], [-2, 3], [-1, 0]],
            "spatial_vision_layer": -1,
            "spatial_target_layers": [2, 5, 8, 11],
            "qformer_config": {
                "model_type": "blip_2_qformer",
                "num_hidden_layers": 2,
                "intermediate_size": 48,
                "cross_attention_frequency": 2,
                "use_qformer_text_input": False,
            },
            **more,
        },
    )
    return _write(Granite4VisionForConditionalGeneration(config), folder)
