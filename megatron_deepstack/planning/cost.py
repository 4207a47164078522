"""Floating-point operations of a forward pass, counted from the recipe alone: two per multiply-add of every matrix.

Norms, activations and the injection (a millionth of the rest) are left out. Causal attention counts half its square.
A backward pass costs twice the forward, of what is trained and of what gradients pass through.
"""

from __future__ import annotations

from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, VisionConfig
from megatron_deepstack.planning.rows import tokens_per_view


def decoder_flops(language: LanguageConfig, seq_length: int) -> float:
    """Forward of one sequence of `seq_length` tokens, output layer included."""
    h, heads = language.hidden_size, language.num_heads
    width = heads * (language.head_dim or h // heads)
    kv_width = width * (language.num_kv_heads or heads) // heads
    weights = h * (2 * width + 2 * kv_width) + 3 * h * language.ffn_hidden_size
    attention = 2 * seq_length * seq_length * width
    return language.num_layers * (2 * seq_length * weights + attention) + 2 * seq_length * h * language.vocab_size


def view_flops(vision: VisionConfig) -> float:
    """Forward of one view through the ViT layers whose output is used."""
    c, tokens = vision.hidden_size, tokens_per_view(vision) + int(vision.class_token)
    layers = vision.num_layers + 1 + vision.select_layer if vision.select_layer < 0 else vision.select_layer
    weights = 4 * c * c + 2 * c * vision.ffn_hidden_size
    patches = 2 * tokens_per_view(vision) * 3 * vision.patch_size**2 * c
    return layers * (2 * tokens * weights + 4 * tokens * tokens * c) + patches


def projector_flops(model: ModelConfig) -> float:
    """Forward of one view's tokens through the projector."""
    hidden = model.language.hidden_size
    return 2.0 * tokens_per_view(model.vision) * hidden * (model.vision.hidden_size + hidden)
