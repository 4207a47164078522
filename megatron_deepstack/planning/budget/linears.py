"""Sizes of the decoder's linear layers, as Megatron fuses them, and what FP8 asks of sizes."""

from __future__ import annotations

from megatron_deepstack.config.choices import Fp8Scaling, LoraTarget
from megatron_deepstack.config.schema import LanguageConfig
from megatron_deepstack.config.sizes import head_width, num_kv_heads

FP8_TOKENS = 32
"""A rank's tokens come in this multiple under FP8: every scaling's matrix products take it, none less than 16."""


def fp8_side(scaling: Fp8Scaling) -> int:
    """What the sides of a matrix must be a multiple of, on every rank."""
    return 32 if scaling is Fp8Scaling.MXFP8 else 16


def linear_sizes(language: LanguageConfig) -> dict[LoraTarget, tuple[int, int]]:
    """Inputs and outputs of a decoder layer's linears, as Megatron fuses them."""
    h, f = language.hidden_size, language.ffn_hidden_size
    width, kv_width = attention_widths(language)
    return {
        LoraTarget.QKV: (h, width + 2 * kv_width),
        LoraTarget.ATTENTION_OUTPUT: (width, h),
        LoraTarget.MLP_IN: (h, 2 * f),
        LoraTarget.MLP_OUT: (f, h),
    }


def attention_widths(language: LanguageConfig) -> tuple[int, int]:
    """All query heads, and all key (or value) heads, side by side."""
    width = head_width(language)
    return language.num_heads * width, num_kv_heads(language) * width
