"""Every tensor of a model by its published name, known without building the model."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megatron_deepstack.config.schema import LoraConfig, ModelConfig
from megatron_deepstack.config.sizes import tokens_per_view
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.config.traits.variants import StackSource
from megatron_deepstack.model.qformer_weights import qformer_rules
from megatron_deepstack.model.rules import Rules, Shape
from megatron_deepstack.model.vision.qformer import QFormers
from megatron_deepstack.model.weights import (
    LAYERS_PREFIX,
    PROJECTOR_PREFIX,
    VISION_PREFIX,
    adapter_rules,
    decoder_layer_names,
    native_encoder_rules,
    vit_layer_rules,
    whole_layer_rules,
)


def published_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Published names and shapes of every tensor of a model, without adapters.

    Args:
        model: The recipe's model.

    Returns:
        The shape of each tensor by its name; the tensors outside the layers come first.
    """
    outside, inside = _decoder_shapes(model)
    if tower_of(model.vision).is_native:
        return {**outside, **shapes_of([native_encoder_rules(model)]), **inside}
    layers = range(model.vision.num_layers)
    rules = [vit_layer_rules(f"{VISION_PREFIX}encoder.layers.{layer}.", model) for layer in layers]
    newline = {"model.image_newline": (model.language.hidden_size,)} if model.variant.traits.has_newline else {}
    return {**_around_layers(model), **_projector(model), **newline, **outside, **shapes_of(rules), **inside}


def _around_layers(model: ModelConfig) -> dict[str, Shape]:
    """Of a tower for views of one size: the tensors outside its layers."""
    vision, tower = model.vision, tower_of(model.vision)
    c, p = vision.hidden_size, vision.patch_size
    embeddings = f"{VISION_PREFIX}embeddings."
    shapes: dict[str, Shape] = {f"{embeddings}patch_embedding.weight": (c, 3, p, p)}
    if tower.has_patch_bias:
        shapes[f"{embeddings}patch_embedding.bias"] = (c,)
    if tower.has_class_token:
        shapes[f"{embeddings}class_embedding"] = (c,)
    shapes[f"{embeddings}position_embedding.weight"] = (tokens_per_view(vision) + tower.num_leading_tokens, c)
    for norm in ("pre_layrnorm",) * tower.has_pre_norm + ("post_layernorm",) * tower.has_post_norm:
        shapes |= {f"{VISION_PREFIX}{norm}.{kind}": (c,) for kind in ("weight", "bias")}
    return shapes


def _projector(model: ModelConfig) -> dict[str, Shape]:
    if model.variant.traits.stack_source is StackSource.TAPS:
        with torch.device("meta"):
            return shapes_of([qformer_rules(QFormers(model, torch.float32), model, PROJECTOR_PREFIX)])
    h, c = model.language.hidden_size, model.vision.hidden_size
    weights: dict[str, Shape] = {f"{PROJECTOR_PREFIX}0.weight": (h, c), f"{PROJECTOR_PREFIX}2.weight": (h, h)}
    return weights | {f"{PROJECTOR_PREFIX}{number}.bias": (h,) for number in (0, 2)}


def decoder_shapes(model: ModelConfig, lora: LoraConfig | None = None) -> dict[str, Shape]:
    """Published names and shapes of every tensor of a decoder, of any variant and on all stages.

    Args:
        model: The recipe's model.
        lora: Its adapters, which are given too.

    Returns:
        The shape of each tensor by its name; the tensors outside the layers come first.
    """
    outside, inside = _decoder_shapes(model)
    if lora is None or not lora.rank:
        return {**outside, **inside}
    adapters = [
        adapter_rules(f"{LAYERS_PREFIX}{layer}.", model.language, lora) for layer in range(model.language.num_layers)
    ]
    return {**outside, **inside, **shapes_of(adapters)}


def shapes_of(rules: Iterable[Rules]) -> dict[str, Shape]:
    """The published tensors that some rules speak of.

    Args:
        rules: Rules of several modules.

    Returns:
        The shape of each tensor by its name, in the order of the rules.
    """
    found: dict[str, Shape] = {}
    for of_module in rules:
        for rule in of_module.values():
            found |= zip(rule.names, rule.shapes, strict=True)
    return found


def _decoder_shapes(model: ModelConfig) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Of a decoder without adapters: the tensors outside its layers, and those inside."""
    language = model.language
    vocabulary = (language.vocab_size, language.hidden_size)
    outside: dict[str, Shape] = {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (language.hidden_size,)}
    if not language.tied_embeddings:
        outside["lm_head.weight"] = vocabulary
    layers = decoder_layer_names(model)
    rules = [whole_layer_rules(model, layer) for layer in range(language.num_layers)]
    return outside, {name: shape for name, shape in shapes_of(rules).items() if name in layers}
