"""ViT with learned positions and projector, and DeepStack-V's stacking inside the ViT (paper section 3.3).

Shapes: N views, S patch side of a view (image_size / patch_size), T tokens of a view (S*S, plus 1 with a class token),
C vision width, H decoder width, A heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_deepstack.config.choices import Activation
from megatron_deepstack.config.schema import VisionConfig
from megatron_deepstack.config.traits.towers import tower_of

Weights = Mapping[str, Tensor]
PREFIX = "model.vision_tower.vision_tower.vision_model."


def num_patches_per_side(vision: VisionConfig) -> int:
    """S, the side of a view in patches."""
    return vision.image_size // vision.patch_size


def num_layers_run(vision: VisionConfig) -> int:
    """Layers whose output can reach the selected hidden state: all but one for `select_layer` -2."""
    return vision.select_layer if vision.select_layer >= 0 else vision.num_layers + 1 + vision.select_layer


def embed_views(vision: VisionConfig, weights: Weights, pixels_N3HW: Tensor) -> Tensor:
    """The tower's embedding: patches and positions; class token, bias and LayerNorm where the tower has them.

    Args:
        vision: The recipe's tower.
        weights: Tensors by published name.
        pixels_N3HW: Normalised pixels.

    Returns:
        (N, T, C) in the dtype of the weights.
    """
    kernel, bias = (weights.get(f"{PREFIX}embeddings.patch_embedding.{kind}") for kind in ("weight", "bias"))
    assert kernel is not None
    patches_NCSS = F.conv2d(pixels_N3HW.to(kernel.dtype), kernel, bias, stride=vision.patch_size)
    hidden_NTC = patches_NCSS.flatten(2).transpose(1, 2)
    positions_TC = weights[PREFIX + "embeddings.position_embedding.weight"]
    if tower_of(vision).has_class_token:
        class_N1C = weights[PREFIX + "embeddings.class_embedding"].expand(hidden_NTC.shape[0], 1, -1)
        hidden_NTC = torch.cat([class_N1C, hidden_NTC], dim=1)
    hidden_NTC = hidden_NTC + positions_TC
    if not tower_of(vision).has_pre_norm:
        return hidden_NTC
    return _layer_norm(vision, weights, "pre_layrnorm", hidden_NTC)  # the published name lacks the e


def run_layers(vision: VisionConfig, weights: Weights, layers: range, hidden_NTC: Tensor) -> Tensor:
    """Some of the tower's layers: LayerNorm first, full attention within a view.

    Args:
        vision: The recipe's tower.
        weights: Tensors by published name.
        layers: 0-based numbers of the layers.
        hidden_NTC: Input of the first of them.

    Returns:
        (N, T, C), the output of the last.
    """
    for layer in layers:
        name = f"encoder.layers.{layer}."
        normed_NTC = _layer_norm(vision, weights, name + "layer_norm1", hidden_NTC)
        hidden_NTC = hidden_NTC + _attention(vision, weights, name + "self_attn.", normed_NTC)
        normed_NTC = _layer_norm(vision, weights, name + "layer_norm2", hidden_NTC)
        wide = _activate(vision.activation, _linear(weights, PREFIX + name + "mlp.fc1", normed_NTC))
        hidden_NTC = hidden_NTC + _linear(weights, PREFIX + name + "mlp.fc2", wide)
    return hidden_NTC


def encode_views(vision: VisionConfig, weights: Weights, pixels_N3HW: Tensor) -> Tensor:
    """Features of the selected hidden state, without the class token.

    Args:
        vision: The recipe's tower.
        weights: Tensors by published name.
        pixels_N3HW: Normalised pixels.

    Returns:
        (N, S * S, C).
    """
    hidden_NTC = embed_views(vision, weights, pixels_N3HW)
    hidden_NTC = run_layers(vision, weights, range(num_layers_run(vision)), hidden_NTC)
    return _features(vision, weights, hidden_NTC)


def add_stacks_in_vit(
    vision: VisionConfig, weights: Weights, global_1TC: Tensor, stacks: Sequence[Tensor], slots: Sequence[int]
) -> Tensor:
    """Run the rest of the tower on the global view alone, and add its stacks on the way.

    A stack before the layer that the selected hidden state enters still counts; later ones have no effect and are
    dropped, as published.

    Args:
        vision: The recipe's tower.
        weights: Tensors by published name.
        global_1TC: State of the global view before layer `slots[0]`.
        stacks: Each (S * S, C).
        slots: The 0-based layer before which each stack is added, ascending.

    Returns:
        Features (1, S * S, C).
    """
    last = num_layers_run(vision)
    hidden_1TC, done = global_1TC, slots[0]
    for stack_TC, slot in zip(stacks, slots, strict=True):
        if slot > last or slot >= vision.num_layers:
            break
        hidden_1TC = run_layers(vision, weights, range(done, slot), hidden_1TC)
        hidden_1TC = hidden_1TC + F.pad(stack_TC, (0, 0, num_leading_tokens(vision), 0))  # class token untouched
        done = slot
    hidden_1TC = run_layers(vision, weights, range(done, last), hidden_1TC)
    return _features(vision, weights, hidden_1TC)


def _features(vision: VisionConfig, weights: Weights, hidden_NTC: Tensor) -> Tensor:
    """The patches' part of the selected state, normed where the tower does so."""
    patches_NPC = hidden_NTC[:, num_leading_tokens(vision) :]
    return (
        _layer_norm(vision, weights, "post_layernorm", patches_NPC) if tower_of(vision).has_post_norm else patches_NPC
    )


def project(weights: Weights, features_C: Tensor) -> Tensor:
    """The projector, Linear-GELU-Linear with biases.

    Args:
        weights: Tensors by published name.
        features_C: (..., C).

    Returns:
        (..., H).
    """
    return _linear(weights, "model.mm_projector.2", F.gelu(_linear(weights, "model.mm_projector.0", features_C)))


def num_leading_tokens(vision: VisionConfig) -> int:
    """Tokens before the patches: the class token, or none."""
    return int(tower_of(vision).has_class_token)


def _attention(vision: VisionConfig, weights: Weights, name: str, x_NTC: Tensor) -> Tensor:
    def heads(projection: str) -> Tensor:
        return _linear(weights, PREFIX + name + projection, x_NTC).unflatten(-1, (vision.num_heads, -1)).transpose(1, 2)

    query_NATD, key_NATD, value_NATD = heads("q_proj"), heads("k_proj"), heads("v_proj")
    scores_NATT = query_NATD @ key_NATD.transpose(-1, -2) / math.sqrt(query_NATD.shape[-1])
    mixed_NTC = (scores_NATT.softmax(-1) @ value_NATD).transpose(1, 2).flatten(2)
    return _linear(weights, PREFIX + name + "out_proj", mixed_NTC)


def _activate(activation: Activation, x: Tensor) -> Tensor:
    if activation is Activation.QUICK_GELU:
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation is Activation.GELU_TANH else "none")


def _layer_norm(vision: VisionConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    weight, bias = weights[PREFIX + name + ".weight"], weights[PREFIX + name + ".bias"]
    return F.layer_norm(x, weight.shape, weight, bias, vision.layernorm_epsilon)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[name + ".weight"], weights[name + ".bias"])
