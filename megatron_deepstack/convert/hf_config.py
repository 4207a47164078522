"""Hugging Face's config.json: what it says of a model beyond the tensors' shapes, and writing one for an export.

Shapes do not show the number of heads, epsilons, the rotary base or the activation; a checkpoint loaded with another
value runs, and is wrong. `require_same_model` compares them, and layers, biases and norms where a config tells them. A
decoder is written as the family whose mathematics the recipe asks for: Qwen3 with norms on queries and keys, Qwen2 with
biases on them, else LLaMA.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_deepstack.config.build import plain
from megatron_deepstack.config.choices import Activation
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, VisionConfig
from megatron_deepstack.errors import CheckpointError, ConfigError

CONFIG = "config.json"
_ACTIVATIONS = {
    Activation.QUICK_GELU: "quick_gelu",
    Activation.GELU: "gelu",
    Activation.GELU_TANH: "gelu_pytorch_tanh",
}
_VISION_DEFAULTS = {
    "clip_vision_model": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 12},
    "siglip_vision_model": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_attention_heads": 12},
}
"""What transformers takes for keys that a config leaves out."""
_DECODER_FAMILIES = {
    "llama": {"qkv_bias": False, "qk_norm": False},
    "mistral": {"qkv_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
}
"""Biases and norms on queries and keys by `model_type`; other families are judged by their tensors alone."""


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint's folder, or beside a file; empty where there is none."""
    file = (path if path.is_dir() else path.parent) / CONFIG
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return config


def require_same_model(config: Mapping[str, Any], model: ModelConfig, where: str) -> None:
    """Raise CheckpointError with every setting in which a checkpoint's config differs from the recipe's model."""
    found = list(_differences(config, model))
    if found:
        listed = "\n  ".join(found)
        raise CheckpointError(f"{where}: its {CONFIG} describes another model than the recipe:\n  {listed}")


def _differences(config: Mapping[str, Any], model: ModelConfig) -> Iterator[str]:
    for text in (config.get("text_config"), config):
        if isinstance(text, Mapping) and _is_decoder(text):
            yield from _compare("model.language", _decoder_facts(text), _language_facts(model.language))
            break
    for vision in (config.get("vision_config"), config):
        if isinstance(vision, Mapping) and "patch_size" in vision:
            yield from _compare("model.vision", _tower_facts(vision, config), _vision_facts(model.vision))
            break


def _is_decoder(config: Mapping[str, Any]) -> bool:
    return "rms_norm_eps" in config and "num_attention_heads" in config


def _compare(section: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    for key, value in theirs.items():
        if value != ours[key]:
            yield f"{section}.{key}: {value!r} in the checkpoint, {ours[key]!r} in the recipe"


def _decoder_facts(text: Mapping[str, Any]) -> dict[str, Any]:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    heads = text["num_attention_heads"]
    return {
        "num_heads": heads,
        "num_kv_heads": text.get("num_key_value_heads") or heads,
        "norm_epsilon": text["rms_norm_eps"],
        "rope_theta": rope.get("rope_theta", text.get("rope_theta", 10000.0)),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "tied_embeddings": text.get("tie_word_embeddings", False),
        "activation": text.get("hidden_act", "silu"),
        **_told(text),
    }


def _told(text: Mapping[str, Any]) -> dict[str, Any]:
    """What only some configs say: the number of layers, and biases and norms that a family has or is given."""
    told = dict(_DECODER_FAMILIES.get(str(text.get("model_type")), {}))
    if "attention_bias" in text and text.get("model_type") != "qwen2":  # transformers' Qwen2 does not look at it
        told["qkv_bias"] = bool(text["attention_bias"])
    if "num_hidden_layers" in text:
        told["num_layers"] = text["num_hidden_layers"]
    return told


def _language_facts(language: LanguageConfig) -> dict[str, Any]:
    return {
        "num_heads": language.num_heads,
        "num_kv_heads": language.num_kv_heads or language.num_heads,
        "norm_epsilon": language.norm_epsilon,
        "rope_theta": language.rope_theta,
        "rope_type": "default",
        "tied_embeddings": language.tied_embeddings,
        "activation": "silu",
        "num_layers": language.num_layers,
        "qkv_bias": language.qkv_bias,
        "qk_norm": language.qk_norm,
    }


def _tower_facts(vision: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    kind = "siglip_vision_model" if "siglip" in str(vision.get("model_type", config.get("model_type"))) else None
    known = {**_VISION_DEFAULTS[kind or "clip_vision_model"], **vision}
    return {
        "num_heads": known["num_attention_heads"],
        "activation": known["hidden_act"],
        "layernorm_epsilon": known["layer_norm_eps"],
        "class_token": kind is None,
    }


def _vision_facts(vision: VisionConfig) -> dict[str, Any]:
    return {
        "num_heads": vision.num_heads,
        "activation": _ACTIVATIONS[vision.activation],
        "layernorm_epsilon": vision.layernorm_epsilon,
        "class_token": vision.class_token,
    }


def decoder_family(language: LanguageConfig) -> str:
    """`model_type` of the decoder. Raises ConfigError for one that no family of transformers computes."""
    if language.qk_norm and language.qkv_bias:
        raise ConfigError(
            ["model.language: transformers has no decoder with both qk_norm and qkv_bias; export with published names"]
        )
    return "qwen3" if language.qk_norm else "qwen2" if language.qkv_bias else "llama"


def text_config(language: LanguageConfig, vocab_size: int) -> dict[str, Any]:
    """A decoder's config, but for its family."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads or language.num_heads,
        "head_dim": language.head_dim or language.hidden_size // language.num_heads,
        "rms_norm_eps": language.norm_epsilon,
        "rope_theta": language.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta},
        "tie_word_embeddings": language.tied_embeddings,
        "hidden_act": "silu",
    }


def vision_config(vision: VisionConfig) -> dict[str, Any]:
    """A vision tower's config: CLIP with a class token, SigLIP (without its pooling head) else."""
    return {
        "model_type": "clip_vision_model" if vision.class_token else "siglip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": _ACTIVATIONS[vision.activation],
        "layer_norm_eps": vision.layernorm_epsilon,
        **({} if vision.class_token else {"vision_use_head": False}),
    }


def llava_config(model: ModelConfig, vocab_size: int, image_token: int, num_image_tokens: int) -> dict[str, Any]:
    """Config of `LlavaForConditionalGeneration`."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token,
        "image_seq_length": num_image_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": model.vision.select_layer,
        "vision_feature_select_strategy": "default" if model.vision.class_token else "full",
        "tie_word_embeddings": model.language.tied_embeddings,
        "text_config": {"model_type": decoder_family(model.language), **text_config(model.language, vocab_size)},
        "vision_config": vision_config(model.vision),
    }


def published_config(model: ModelConfig) -> dict[str, Any]:
    """Config beside published names. Its `model_type` is none of transformers', which would drop the vision tower."""
    return {
        "model_type": str(model.variant),
        **text_config(model.language, model.language.vocab_size),
        "vision_config": vision_config(model.vision),
        "mm_vision_select_layer": model.vision.select_layer,
        "stacks": plain(model.stacks),
    }
