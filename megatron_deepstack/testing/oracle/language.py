"""LLaMA-type decoder with stacks added before chosen layers (paper equation 8, algorithm 1).

Shapes: B batch, T sequence, H width, A query heads, K key/value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_deepstack.config.choices import Activation, RopeType
from megatron_deepstack.config.schema import LanguageConfig, RopeScalingConfig
from megatron_deepstack.config.traits.families import family_of

Weights = Mapping[str, Tensor]


def embed_tokens(weights: Weights, tokens: Tensor) -> Tensor:
    """Token ids to rows of the embedding.

    Args:
        weights: Tensors by published name.
        tokens: int64, any shape.

    Returns:
        (..., H) in the dtype of the weights.
    """
    return F.embedding(tokens, weights["model.embed_tokens.weight"])


def decode(
    language: LanguageConfig, weights: Weights, hidden_BTH: Tensor, additions_by_layer: Mapping[int, Tensor]
) -> Tensor:
    """The decoder, with stacks added before chosen layers. Gradients flow to everything.

    Args:
        language: The recipe's decoder.
        weights: Tensors by published name.
        hidden_BTH: Input of the first layer.
        additions_by_layer: By the 0-based number of a layer, (B, T, H) that is added to its input.

    Returns:
        Logits (B, T, vocabulary).

    Raises:
        AssertionError: An addition belongs to a layer that the decoder does not have.
    """
    outside = [layer for layer in additions_by_layer if not 0 <= layer < language.num_layers]
    assert not outside, f"stacks before layers {outside}, but the decoder has layers 0..{language.num_layers - 1}"
    for layer in range(language.num_layers):
        if layer in additions_by_layer:
            hidden_BTH = hidden_BTH + additions_by_layer[layer]
        hidden_BTH = _layer(language, weights, f"model.layers.{layer}.", hidden_BTH)
    hidden_BTH = _rms_norm(language, weights["model.norm.weight"], hidden_BTH)
    head = "model.embed_tokens.weight" if language.tied_embeddings else "lm_head.weight"
    return hidden_BTH @ weights[head].T


def _layer(language: LanguageConfig, weights: Weights, name: str, x_BTH: Tensor) -> Tensor:
    normed_BTH = _rms_norm(language, weights[name + "input_layernorm.weight"], x_BTH)
    x_BTH = x_BTH + _attention(language, weights, name + "self_attn.", normed_BTH)
    normed_BTH = _rms_norm(language, weights[name + "post_attention_layernorm.weight"], x_BTH)
    gate = _activate(family_of(language).activation, _linear(weights, name + "mlp.gate_proj", normed_BTH))
    up = _linear(weights, name + "mlp.up_proj", normed_BTH)
    return x_BTH + _linear(weights, name + "mlp.down_proj", gate * up)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """With a bias where the family has one."""
    return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))


def _activate(activation: Activation, x: Tensor) -> Tensor:
    if activation is Activation.QUICK_GELU:
        return x * torch.sigmoid(1.702 * x)
    if activation is Activation.SILU:
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation is Activation.GELU_TANH else "none")


def _attention(language: LanguageConfig, weights: Weights, name: str, x_BTH: Tensor) -> Tensor:
    """Causal attention; with fewer key/value heads, each serves A / K consecutive query heads."""
    num_kv_heads = language.num_kv_heads or language.num_heads

    def heads(projection: str, num_heads: int) -> Tensor:
        bias = weights[f"{name}{projection}_proj.bias"] if language.qkv_bias else None
        x = F.linear(x_BTH, weights[f"{name}{projection}_proj.weight"], bias).unflatten(-1, (num_heads, -1))
        if language.qk_norm and projection != "v":
            x = _rms_norm(language, weights[f"{name}{projection}_norm.weight"], x)
        return x.transpose(1, 2)

    query_BATD = _rotate(language, heads("q", language.num_heads))
    key_BKTD, value_BKTD = _rotate(language, heads("k", num_kv_heads)), heads("v", num_kv_heads)
    key_BATD = key_BKTD.repeat_interleave(language.num_heads // num_kv_heads, dim=1)
    value_BATD = value_BKTD.repeat_interleave(language.num_heads // num_kv_heads, dim=1)
    scores_BATT = query_BATD @ key_BATD.transpose(-1, -2) / math.sqrt(query_BATD.shape[-1])
    future_TT = torch.ones(scores_BATT.shape[-2:], dtype=torch.bool, device=x_BTH.device).triu(1)
    probabilities_BATT = scores_BATT.masked_fill(future_TT, -math.inf).softmax(-1)
    return _linear(weights, name + "o_proj", (probabilities_BATT @ value_BATD).transpose(1, 2).flatten(2))


def _rotate(language: LanguageConfig, x_BATD: Tensor) -> Tensor:
    """Rotary positions 0..T-1; channel c turns together with channel c + D/2."""
    length, width = x_BATD.shape[-2:]
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=x_BATD.device) / width
    frequencies = _scaled(language.rope_scaling, language.rope_theta**-exponents)
    angles = torch.arange(length, dtype=torch.float64, device=x_BATD.device)[:, None] * frequencies
    cos, sin = angles.cos().to(x_BATD.dtype), angles.sin().to(x_BATD.dtype)
    first, second = x_BATD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _scaled(scaling: RopeScalingConfig, frequencies: Tensor) -> Tensor:
    """Frequencies of a scaled decoder; one that turns more often within the original length keeps more of itself."""
    if scaling.rope_type is RopeType.DEFAULT:
        return frequencies
    assert scaling.factor is not None
    if scaling.rope_type is RopeType.LINEAR:
        return frequencies / scaling.factor
    assert scaling.rope_type is RopeType.LLAMA3, f"the oracle does not know {scaling.rope_type}"
    assert scaling.original_max_position_embeddings is not None
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _rms_norm(language: LanguageConfig, weight: Tensor, x: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + language.norm_epsilon)
