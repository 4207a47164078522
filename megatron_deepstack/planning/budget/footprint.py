"""The bytes that a run needs, counted from the recipe: parameters, a checkpoint, the memory of a rank.

A weight takes 2 bytes in bf16 and 4 in float32. A weight that learns also has a float32 gradient, Adam's two float32
moments, and in bf16 a float32 copy. Activations are not counted, so a rank always needs more than this.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_deepstack.config.choices import Part, Precision
from megatron_deepstack.config.schema import ModelConfig, Recipe, VisionConfig
from megatron_deepstack.config.sizes import expert_layers, tokens_per_view
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.config.traits.variants import StackSource
from megatron_deepstack.planning.budget.cost import adapter_weights
from megatron_deepstack.planning.budget.linears import expert_weights, layer_weights
from megatron_deepstack.planning.slots import Chunk, stage_chunks

_GRADIENT_BYTES = 4


def part_parameters(model: ModelConfig) -> dict[Part, int]:
    """Count the parameters of each part. The padding of the vocabulary and a few learned vectors are left out."""
    language, vision = model.language, model.vision
    h = language.hidden_size
    heads = 1 if language.tied_embeddings else 2
    return {
        Part.VISION: _vision_parameters(vision),
        Part.PROJECTOR: _projector_parameters(model),
        Part.LANGUAGE: _layers_parameters(model, range(language.num_layers)) + heads * language.vocab_size * h + h,
    }


def active_parameters(model: ModelConfig) -> int:
    """Count the parameters that a token passes: of experts those that it is sent to, and all others."""
    language = model.language
    idle = language.num_experts - language.num_active_experts
    return sum(part_parameters(model).values()) - len(expert_layers(language)) * idle * expert_weights(language)


def weight_bytes(recipe: Recipe) -> int:
    """Return the bytes of the model's weights in the run's precision."""
    return sum(part_parameters(recipe.model).values()) * _weight_bytes(recipe)


def checkpoint_bytes(recipe: Recipe) -> int:
    """Return the bytes of one checkpoint: all weights, and the optimizer's states of those that learn."""
    weights = sum(part_parameters(recipe.model).values()) + _adapters(recipe)
    return weights * _weight_bytes(recipe) + _learned(recipe) * _state_bytes(recipe)


def checkpoints_at_once(recipe: Recipe) -> int:
    """Return how many checkpoints are in the run folder at the same time, with the one that is being written.

    Args:
        recipe: The run's recipe.

    Returns:
        At least 1. If all checkpoints are kept, only the first three count, and those that `keep_every` keeps do not
        count, since users are expected to move such checkpoints elsewhere.
    """
    every, steps = recipe.checkpoint.interval, recipe.train.steps
    saves = -(-steps // every) if every else 1
    return max(1, min(saves, (recipe.checkpoint.keep or 2) + 1))


def rank_bytes(recipe: Recipe, num_ranks: int) -> int:
    """Return the memory of weights, gradients and optimizer states on the rank that needs most.

    Args:
        recipe: The recipe.
        num_ranks: Number of ranks of the run, over which a distributed optimizer splits its states.

    Returns:
        Bytes, without activations.
    """
    parallel, parameters = recipe.parallel, part_parameters(recipe.model)
    distributed = parallel.distributed_optimizer
    shares = num_ranks // (parallel.tensor * parallel.pipeline) if distributed else 1
    expert_shares = num_ranks // (parallel.expert * parallel.pipeline) if distributed else 1
    everyone = num_ranks if distributed else 1
    encoder = parameters[Part.VISION] + parameters[Part.PROJECTOR]
    encoder_learned = _learned_of(recipe, Part.VISION) + _learned_of(recipe, Part.PROJECTOR)
    whole, of_experts = _fullest_stage(recipe)
    decoder, experts = (whole - of_experts) // parallel.tensor, of_experts // parallel.expert
    decoder_learned = decoder * _learned_of(recipe, Part.LANGUAGE) // parameters[Part.LANGUAGE]
    experts_learned = experts * (Part.LANGUAGE in recipe.train.trainable and not recipe.lora.rank)
    return (
        _held(recipe, encoder, encoder_learned, everyone)
        + _held(recipe, decoder, decoder_learned, shares)
        + _held(recipe, experts, experts_learned, expert_shares)
    )


def _held(recipe: Recipe, weights: int, learned: int, shares: int) -> int:
    """Return the bytes of parameters whose optimizer states are split over `shares` ranks."""
    return weights * _weight_bytes(recipe) + learned * _GRADIENT_BYTES + learned * _state_bytes(recipe) // shares


def _fullest_stage(recipe: Recipe) -> tuple[int, int]:
    """Return the decoder parameters of the pipeline stage that has most, and those of experts among them."""
    language = recipe.model.language
    stages, experts = [0] * recipe.parallel.pipeline, [0] * recipe.parallel.pipeline
    for chunk in stage_chunks(language.num_layers, recipe.parallel):
        stages[chunk.pp] += _chunk_parameters(recipe.model, chunk)
        layers = sum(chunk.first <= layer < chunk.stop for layer in expert_layers(language))
        experts[chunk.pp] += layers * language.num_experts * expert_weights(language)
    return max(zip(stages, experts, strict=True))


def _learned(recipe: Recipe) -> int:
    return sum(_learned_of(recipe, part) for part in Part)


def _learned_of(recipe: Recipe, part: Part) -> int:
    """Count the parameters of a part that learn; of a decoder with adapters only the adapters."""
    if part not in recipe.train.trainable:
        return 0
    if part is Part.LANGUAGE and recipe.lora.rank:
        return _adapters(recipe)
    return part_parameters(recipe.model)[part]


def _adapters(recipe: Recipe) -> int:
    return adapter_weights(recipe.model.language, recipe.lora) if recipe.lora.rank else 0


def _weight_bytes(recipe: Recipe) -> int:
    return 4 if recipe.train.precision is Precision.FP32 else 2


def _state_bytes(recipe: Recipe) -> int:
    return 8 if recipe.train.precision is Precision.FP32 else 12


def _layers_parameters(model: ModelConfig, layers: Iterable[int]) -> int:
    language = model.language
    return sum(layer_weights(language, layer) + 2 * language.hidden_size for layer in layers)


def _chunk_parameters(model: ModelConfig, chunk: Chunk) -> int:
    tables = int(chunk.has_embedding) + int(chunk.has_head)
    tables = 1 if tables == 2 and model.language.tied_embeddings else tables
    table = model.language.vocab_size * model.language.hidden_size
    return _layers_parameters(model, range(chunk.first, chunk.stop)) + tables * table


def _projector_parameters(model: ModelConfig) -> int:
    vision, c, h = model.vision, model.vision.hidden_size, model.language.hidden_size
    if tower_of(vision).is_native:
        block = c * vision.merge_size**2
        merger = (block + 1) * block + (block + 1) * h
        return merger + 2 * c + len(vision.taps) * (merger + 2 * block)
    if model.variant.traits.stack_source is StackSource.TAPS:
        return len(vision.taps) * _qformer_parameters(model)
    return (c + 1) * h + (h + 1) * h


def _qformer_parameters(model: ModelConfig) -> int:
    qformer, c = model.qformer, model.vision.hidden_size
    attention, f = 4 * (c + 1) * c + 2 * c, qformer.ffn_hidden_size
    crossing = -(-qformer.num_layers // qformer.cross_attention_interval)
    layers = (qformer.num_layers + crossing) * attention + qformer.num_layers * ((c + 1) * f + (f + 1) * c + 2 * c)
    vectors = qformer.query_side**2 + qformer.window_side**2 + 4
    return layers + vectors * c + (c + 1) * model.language.hidden_size


def _vision_parameters(vision: VisionConfig) -> int:
    c, f = vision.hidden_size, vision.ffn_hidden_size
    layer = 4 * (c + 1) * c + (c + 1) * f + (f + 1) * c + 4 * c
    traits = tower_of(vision)
    norms = 2 * (int(traits.has_pre_norm) + int(traits.has_post_norm))
    if traits.is_native:
        patch = 3 * vision.temporal_patch_size * vision.patch_size**2 + 1
        return vision.num_layers * layer + (patch + (vision.num_positions or 0)) * c
    vectors = tokens_per_view(vision) + 2 * traits.num_leading_tokens + int(traits.has_patch_bias) + norms
    embedding = (3 * vision.patch_size**2 + vectors) * c
    return vision.num_layers * layer + embedding
