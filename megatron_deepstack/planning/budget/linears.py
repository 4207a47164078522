"""Sizes of the decoder's linear layers, as Megatron fuses them, and the multiples that FP8 needs."""

from __future__ import annotations

from megatron_deepstack.config.choices import Fp8Scaling, LoraTarget
from megatron_deepstack.config.schema import LanguageConfig
from megatron_deepstack.config.sizes import expert_layers, head_width, num_kv_heads

FP8_TOKENS = 32
"""Under FP8 the tokens of a rank are a multiple of this. Some scalings need 16, and 32 is enough for all of them."""

_ATTENTION = (LoraTarget.QKV, LoraTarget.ATTENTION_OUTPUT)


def fp8_side(scaling: Fp8Scaling) -> int:
    """Return the number of which both sides of each matrix must be a multiple on every rank."""
    return 32 if scaling is Fp8Scaling.MXFP8 else 16


def linear_sizes(language: LanguageConfig) -> dict[LoraTarget, tuple[int, int]]:
    """Return (inputs, outputs) of each linear layer of a decoder layer, as Megatron fuses them."""
    h, f = language.hidden_size, language.ffn_hidden_size
    width, kv_width = attention_widths(language)
    return {
        LoraTarget.QKV: (h, width + 2 * kv_width),
        LoraTarget.ATTENTION_OUTPUT: (width, h),
        LoraTarget.MLP_IN: (h, 2 * f),
        LoraTarget.MLP_OUT: (f, h),
    }


def layer_weights(language: LanguageConfig, layer: int, *, active: bool = False) -> int:
    """Count the entries of the matrices of one decoder layer.

    Args:
        language: The decoder.
        layer: Number of the layer, counted from 0.
        active: Count only the experts that a token passes, which is what its products take; otherwise all.

    Returns:
        The entries, before any parallelism splits them.
    """
    return _weights(language, layer in expert_layers(language), active)


def passed_weights(language: LanguageConfig) -> int:
    """Count the entries of all layers' matrices that a token passes; of experts those that it is sent to.

    Args:
        language: The decoder.

    Returns:
        The entries over all layers, before any parallelism splits them.
    """
    with_experts = len(expert_layers(language))
    dense = language.num_layers - with_experts
    found = dense * _weights(language, False, True)
    return found + (with_experts * _weights(language, True, True) if with_experts else 0)


def _weights(language: LanguageConfig, has_experts: bool, active: bool) -> int:
    sizes = linear_sizes(language)
    attention = sum(inputs * outputs for target, (inputs, outputs) in sizes.items() if target in _ATTENTION)
    if not has_experts:
        return attention + sum(i * o for target, (i, o) in sizes.items() if target not in _ATTENTION)
    experts = language.num_active_experts if active else language.num_experts
    return attention + router_weights(language) + experts * expert_weights(language)


def router_weights(language: LanguageConfig) -> int:
    """Count the entries of the router of a layer with experts."""
    return language.num_experts * language.hidden_size


def expert_weights(language: LanguageConfig) -> int:
    """Count the entries of the matrices of one expert."""
    return 3 * language.hidden_size * language.expert_ffn_hidden_size


def attention_widths(language: LanguageConfig) -> tuple[int, int]:
    """Return the width of all query heads together, and the width of all key heads (or value heads) together."""
    width = head_width(language)
    return language.num_heads * width, num_kv_heads(language) * width
