"""The exact number of parameters that a rank holds, by part, counted from the recipe.

The decoder's matrices are split over tensor parallelism, and its layers over stages. The encoder is whole on every
rank. A test compares the counts with the modules that are built.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import lcm

from megatron_deepstack.config.choices import LoraTarget, Part
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, Recipe, VisionConfig
from megatron_deepstack.config.sizes import expert_layers, head_width, tokens_per_view, used_layers
from megatron_deepstack.config.traits.families import family_of
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.planning.budget.linears import (
    attention_widths,
    expert_weights,
    layer_weights,
    linear_sizes,
    router_weights,
)
from megatron_deepstack.planning.slots import Chunk, stage_chunks

_VOCABULARY_MULTIPLE = 128
_ROWS = (LoraTarget.ATTENTION_OUTPUT, LoraTarget.MLP_OUT)


@dataclass(frozen=True, slots=True)
class Held:
    """Parameters of a part on one rank."""

    total: int
    learned: int
    """Those that learn, which have a gradient and optimizer states."""
    vectors: int
    """Of `total`, entries of norms, biases and other vectors."""
    experts: int = 0
    """Of `total`, those of experts, of which other ranks of the stage hold copies than of the rest."""
    experts_learned: int = 0
    """Of `experts`, those that learn."""


def padded_vocabulary(vocab_size: int, tensor_ranks: int) -> int:
    """Return the rows of the embedding: the vocabulary rounded up so that ranks and tensor cores divide it.

    Args:
        vocab_size: Number of token ids.
        tensor_ranks: Size of tp.

    Returns:
        The number of rows over all ranks.
    """
    multiple = lcm(_VOCABULARY_MULTIPLE, tensor_ranks)
    return -(-vocab_size // multiple) * multiple


def active_matrices(model: ModelConfig, tensor_ranks: int) -> float:
    """Count the entries of matrices that a token passes in a decoder layer, on average, as one tp rank's share.

    Tokens are spread evenly over experts, and each tp rank sends its own part of the sequence to them.

    Args:
        model: The recipe's model.
        tensor_ranks: Size of tp.

    Returns:
        The mean over layers.
    """
    language = model.language
    whole = sum(layer_weights(language, layer, active=True) for layer in range(language.num_layers))
    return whole / language.num_layers / tensor_ranks


def layer_parameters(model: ModelConfig, tensor_ranks: int = 1, layer: int | None = None) -> tuple[int, int]:
    """Count the parameters of one decoder layer on one tensor-parallel rank, those of experts left out.

    Args:
        model: The recipe's model.
        tensor_ranks: Size of tp.
        layer: Number of the layer, which may have experts; None for one that has none.

    Returns:
        Entries of matrices, and entries of norms and biases.
    """
    language, sizes = model.language, linear_sizes(model.language)
    has_experts = layer in expert_layers(language)
    dense = [target for target in sizes if not has_experts or target not in (LoraTarget.MLP_IN, LoraTarget.MLP_OUT)]
    matrices = sum(sizes[target][0] * sizes[target][1] for target in dense) // tensor_ranks
    matrices += router_weights(language) * has_experts
    vectors = 2 * language.hidden_size
    if language.qkv_bias:
        vectors += sizes[LoraTarget.QKV][1] // tensor_ranks
    if language.qk_norm:
        vectors += 2 * head_width(language)
    if family_of(language).has_linear_biases:
        vectors += 2 * language.hidden_size + sizes[LoraTarget.MLP_IN][1] // tensor_ranks
        if not language.qkv_bias:
            vectors += sizes[LoraTarget.QKV][1] // tensor_ranks
    return matrices, vectors


def stage_parameters(recipe: Recipe, stage: int) -> Held:
    """Count the decoder's parameters on a rank of one pipeline stage.

    Args:
        recipe: The recipe, whose layout has been checked.
        stage: Number of the stage.

    Returns:
        The counts on each of the stage's ranks.
    """
    chunks = stage_chunks(recipe.model.language.num_layers, recipe.parallel)
    found = [_chunk(recipe, chunk) for chunk in chunks if chunk.pp == stage]
    return Held(*(sum(getattr(one, field.name) for one in found) for field in fields(Held)))


def encoder_parameters(recipe: Recipe) -> Held:
    """Count the parameters of tower, projector and newline, which every rank holds."""
    model, trainable = recipe.model, recipe.train.trainable
    layer, around, norms = _tower(model.vision)
    hidden, width = model.language.hidden_size, model.vision.hidden_size
    projector = (width + 1) * hidden + (hidden + 1) * hidden + hidden * model.variant.traits.has_newline
    tower = model.vision.num_layers * layer + around
    learned = projector * (Part.PROJECTOR in trainable)
    if Part.VISION in trainable:
        learned += min(used_layers(model.vision), model.vision.num_layers) * layer + around
    return Held(tower + projector, learned, model.vision.num_layers * norms + 2 * hidden)


def model_parameters(model: ModelConfig) -> dict[Part, int]:
    """Count the parameters of each part of the whole model, with the padded rows of the vocabulary."""
    alone = Recipe(model=model)
    layer, around, _ = _tower(model.vision)
    tower = model.vision.num_layers * layer + around
    return {
        Part.VISION: tower,
        Part.PROJECTOR: encoder_parameters(alone).total - tower,
        Part.LANGUAGE: stage_parameters(alone, 0).total,
    }


def _chunk(recipe: Recipe, chunk: Chunk) -> Held:
    model, parallel = recipe.model, recipe.parallel
    layers, language = chunk.stop - chunk.first, model.language
    counts = [layer_parameters(model, parallel.tensor, layer) for layer in range(chunk.first, chunk.stop)]
    matrices, vectors = sum(count for count, _ in counts), sum(count for _, count in counts)
    with_experts = sum(chunk.first <= layer < chunk.stop for layer in expert_layers(language))
    experts = with_experts * (language.num_experts // parallel.expert) * expert_weights(language)
    tables = int(chunk.has_embedding) + int(chunk.has_head)
    if tables == 2 and model.language.tied_embeddings:
        tables = 1
    table = padded_vocabulary(model.language.vocab_size, parallel.tensor) // parallel.tensor
    total = matrices + vectors + experts + tables * table * model.language.hidden_size
    small = vectors + chunk.has_head * model.language.hidden_size
    total += chunk.has_head * model.language.hidden_size
    adapters = layers * _adapters(recipe, parallel)
    learned = 0
    if Part.LANGUAGE in recipe.train.trainable:
        learned = adapters if recipe.lora.rank else total
    return Held(total + adapters, learned, small, experts, experts * (learned == total))


def _adapters(recipe: Recipe, parallel: ParallelConfig) -> int:
    """Count the adapters of one layer on one rank; the matrix that is not split is whole on each."""
    if not recipe.lora.rank:
        return 0
    sizes, found = linear_sizes(recipe.model.language), 0
    for target in recipe.lora.targets:
        inputs, outputs = sizes[target]
        row = target in _ROWS
        found += recipe.lora.rank * (inputs // (parallel.tensor if row else 1))
        found += recipe.lora.rank * (outputs // (1 if row else parallel.tensor))
    return found


def _tower(vision: VisionConfig) -> tuple[int, int, int]:
    """Return the parameters of one layer of the tower, those around its layers, and the vectors of a layer."""
    width, inner = vision.hidden_size, vision.ffn_hidden_size
    vectors = 4 * width + 4 * width + inner + width
    layer = 4 * width * width + 2 * width * inner + vectors
    traits = tower_of(vision)
    norms = 2 * (int(traits.has_pre_norm) + int(traits.has_post_norm))
    rows = tokens_per_view(vision) + 2 * traits.num_leading_tokens + int(traits.has_patch_bias) + norms
    return layer, (3 * vision.patch_size**2 + rows) * width, vectors


def kept_widths(model: ModelConfig, tensor_ranks: int) -> tuple[int, int, int]:
    """Return what one tp rank has of the widths of a layer.

    Args:
        model: The recipe's model.
        tensor_ranks: Size of tp.

    Returns:
        Width of queries, of keys (or values), and of the MLP; of experts together the widths of those that a token is
        sent to, as the mean over layers.
    """
    language = model.language
    queries, keys = attention_widths(language)
    with_experts = len(expert_layers(language))
    active = with_experts * language.num_active_experts * language.expert_ffn_hidden_size
    inner = ((language.num_layers - with_experts) * language.ffn_hidden_size + active) // language.num_layers
    return queries // tensor_ranks, keys // tensor_ranks, inner // tensor_ranks
