"""Sizes of the decoder's linear layers, as Megatron fuses them, and the multiples that FP8 needs."""

from __future__ import annotations

from megatron_deepstack.config.choices import Fp8Scaling, LoraTarget
from megatron_deepstack.config.schema import LanguageConfig
from megatron_deepstack.config.sizes import head_width, num_kv_heads

FP8_TOKENS = 32
"""Under FP8 the tokens of a rank are a multiple of this. Some scalings need 16, and 32 is enough for all of them."""


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


def attention_widths(language: LanguageConfig) -> tuple[int, int]:
    """Return the width of all query heads together, and the width of all key heads (or value heads) together."""
    width = head_width(language)
    return language.num_heads * width, num_kv_heads(language) * width
