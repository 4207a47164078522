"""The recipe's numbers in Hugging Face's words, under the names that `HfField.reads` uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from megatron_deepstack.config.choices import Activation
from megatron_deepstack.config.schema import LanguageConfig, VisionConfig
from megatron_deepstack.config.sizes import head_width, num_kv_heads
from megatron_deepstack.config.traits.families import HfDecoder, family_of

ACTIVATIONS = {
    Activation.QUICK_GELU: "quick_gelu",
    Activation.GELU: "gelu",
    Activation.GELU_TANH: "gelu_pytorch_tanh",
    Activation.SILU: "silu",
}
CONFIG: Final = "config.json"
PREPROCESSOR: Final = "preprocessor_config.json"
PROCESSOR: Final = "processor_config.json"


def language_facts(language: LanguageConfig) -> dict[str, Any]:
    """What the recipe's decoder is, number by number.

    Args:
        language: The recipe's decoder.

    Returns:
        Values by the names that `HfField.reads` uses. `num_kv_heads` and `head_dim` are numbers even where the recipe
        leaves them out.
    """
    return {
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "ffn_hidden_size": language.ffn_hidden_size,
        "num_layers": language.num_layers,
        "num_heads": language.num_heads,
        "num_kv_heads": num_kv_heads(language),
        "head_dim": head_width(language),
        "norm_epsilon": language.norm_epsilon,
        "rope_theta": language.rope_theta,
        "tied_embeddings": language.tied_embeddings,
        "embedding_multiplier": language.embedding_multiplier,
        "attention_multiplier": language.attention_multiplier,
        "residual_multiplier": language.residual_multiplier,
        "logits_scaling": language.logits_scaling,
        "qkv_bias": language.qkv_bias,
        "qk_norm": language.qk_norm,
        "num_experts": language.num_experts,
        "num_active_experts": language.num_active_experts,
        "expert_ffn_hidden_size": language.expert_ffn_hidden_size,
        "expert_interval": language.expert_interval,
        "dense_layers": list(language.dense_layers),
        "balance_loss": language.balance_loss,
        "activation": ACTIVATIONS[family_of(language).activation],
    }


def with_usual_keys(text: Mapping[str, Any], decoder: HfDecoder) -> dict[str, Any]:
    """A decoder's config with the names of keys that the table of its family has.

    Args:
        text: The config, in which transformers may have written another name of a key.
        decoder: How Hugging Face stores the family.

    Returns:
        The same values. Where both names are there, the usual one stays.
    """
    renamed = {decoder.other_keys[key]: value for key, value in text.items() if key in decoder.other_keys}
    usual = {key: value for key, value in text.items() if key not in decoder.other_keys and value is not None}
    return {**renamed, **usual}


def vision_facts(vision: VisionConfig) -> dict[str, Any]:
    """What the recipe's tower is, number by number."""
    return {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_size": vision.hidden_size,
        "ffn_hidden_size": vision.ffn_hidden_size,
        "num_layers": vision.num_layers,
        "num_heads": vision.num_heads,
        "activation": ACTIVATIONS[vision.activation],
        "layernorm_epsilon": vision.layernorm_epsilon,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.merge_size,
        "num_positions": vision.num_positions,
        "taps": list(vision.taps),
    }
