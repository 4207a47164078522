"""The exact number of parameters that a rank holds, by part, counted from the recipe: the only count there is.

The decoder's matrices are split over tensor parallelism, and its layers over stages. The encoder is whole on every
rank (`encoder_parameters`). A test compares the counts with the modules that are built, for all families and layouts.

A decoder layer is counted as attention and MLP, or attention, router and experts, of which a token passes some: what a
rank holds, and what a token passes (`cost` counts operations from `linears`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_deepstack.config.choices import LoraTarget, Part
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, ParallelConfig, Recipe
from megatron_deepstack.config.sizes import expert_layers, head_width, padded_vocabulary
from megatron_deepstack.config.traits.families import family_of
from megatron_deepstack.planning.budget.cost import adapter_weights
from megatron_deepstack.planning.budget.encoder_parameters import (
    projector_adapters,
    projector_parameters,
    tower_adapters,
    tower_parameters,
)
from megatron_deepstack.planning.budget.linears import (
    attention_widths,
    expert_weights,
    linear_sizes,
    passed_weights,
    router_weights,
)
from megatron_deepstack.planning.slots import Chunk, stage_chunks

_ATTENTION = (LoraTarget.QKV, LoraTarget.ATTENTION_OUTPUT)
_MLP = (LoraTarget.MLP_IN, LoraTarget.MLP_OUT)
_ROWS = (LoraTarget.ATTENTION_OUTPUT, LoraTarget.MLP_OUT)


@dataclass(frozen=True, slots=True)
class Held:
    """Parameters of a part on one rank."""

    total: int
    learned: int
    """Those that learn, which have a gradient and optimizer states."""
    experts: int = 0
    """Of `total`, those of experts, of which other ranks hold copies than of the rest."""
    experts_learned: int = 0
    """Of `experts`, those that learn."""


def layer_parameters(model: ModelConfig, tensor_ranks: int = 1, *, has_experts: bool = False) -> tuple[int, int]:
    """Count the parameters of one decoder layer on one tensor-parallel rank, without its experts.

    Args:
        model: The recipe's model.
        tensor_ranks: Size of tp.
        has_experts: Whether the layer has experts, and so a router in place of an MLP.

    Returns:
        Entries of matrices, and entries of norms and biases.
    """
    attention = _attention_parameters(model, tensor_ranks)
    mlp = (router_weights(model.language), 0) if has_experts else _mlp_parameters(model, tensor_ranks)
    norms = 2 * model.language.hidden_size
    return attention[0] + mlp[0], attention[1] + mlp[1] + norms


def layers_parameters(model: ModelConfig, num_layers: int, with_experts: int, tensor_ranks: int = 1) -> int:
    """Count the parameters of some decoder layers on one tensor-parallel rank, without their experts.

    Args:
        model: The recipe's model.
        num_layers: Number of layers.
        with_experts: Number of those that have experts.
        tensor_ranks: Size of tp.

    Returns:
        The entries of all.
    """
    found = (num_layers - with_experts) * sum(layer_parameters(model, tensor_ranks))
    return found + with_experts * sum(layer_parameters(model, tensor_ranks, has_experts=True))


def expert_parameters(language: LanguageConfig, with_experts: int, expert_ranks: int = 1) -> int:
    """Count the parameters of experts on one of the ranks that share them.

    Args:
        language: The decoder.
        with_experts: Number of layers that have experts.
        expert_ranks: Ranks that share the experts of a layer.

    Returns:
        The parameters of all these layers.
    """
    return with_experts * (language.num_experts // expert_ranks) * expert_weights(language)


def active_matrices(model: ModelConfig, tensor_ranks: int) -> float:
    """Count the entries of matrices that a token passes in a decoder layer, as one tensor-parallel rank's share.

    Tokens are spread evenly over experts, and each tensor-parallel rank sends its own part of the sequence to them.

    Args:
        model: The recipe's model.
        tensor_ranks: Size of tp.

    Returns:
        The mean over layers.
    """
    language = model.language
    return passed_weights(language) / language.num_layers / tensor_ranks


def active_parameters(model: ModelConfig) -> int:
    """Count the parameters that a token passes: of experts those that it is sent to, and all others."""
    language = model.language
    idle = len(expert_layers(language)) * (language.num_experts - language.num_active_experts)
    return sum(model_parameters(model).values()) - idle * expert_weights(language)


def _attention_parameters(model: ModelConfig, tensor_ranks: int) -> tuple[int, int]:
    """Return entries of matrices and of vectors."""
    language, sizes = model.language, linear_sizes(model.language)
    biases = family_of(language).has_linear_biases
    vectors = (language.qkv_bias or biases) * sizes[LoraTarget.QKV][1] // tensor_ranks
    vectors += language.qk_norm * 2 * head_width(language) + biases * language.hidden_size
    return _entries(model, _ATTENTION, tensor_ranks), vectors


def _mlp_parameters(model: ModelConfig, tensor_ranks: int) -> tuple[int, int]:
    """Return entries of matrices and of vectors."""
    language, biases = model.language, family_of(model.language).has_linear_biases
    vectors = biases * (language.hidden_size + linear_sizes(language)[LoraTarget.MLP_IN][1] // tensor_ranks)
    return _entries(model, _MLP, tensor_ranks), vectors


def _entries(model: ModelConfig, targets: tuple[LoraTarget, ...], tensor_ranks: int) -> int:
    sizes = linear_sizes(model.language)
    return sum(sizes[one][0] * sizes[one][1] for one in targets) // tensor_ranks


def parameters_of_stages(recipe: Recipe) -> tuple[Held, ...]:
    """Count the decoder's parameters on a rank of each pipeline stage.

    Args:
        recipe: The recipe, whose layout has been checked.

    Returns:
        The counts on each of a stage's ranks, stage by stage.
    """
    counted: dict[tuple[int, int, bool, bool], Held] = {}
    found: list[list[Held]] = [[] for _ in range(recipe.parallel.pipeline)]
    for chunk in stage_chunks(recipe.model.language.num_layers, recipe.parallel):
        number = _layers_with_experts(recipe, chunk)
        kind = chunk.stop - chunk.first, number, chunk.has_embedding, chunk.has_head
        if kind not in counted:
            counted[kind] = parameters_of_chunk(recipe, chunk)
        found[chunk.pp].append(counted[kind])
    return tuple(_together(mine) for mine in found)


def _layers_with_experts(recipe: Recipe, chunk: Chunk) -> int:
    with_experts = expert_layers(recipe.model.language)
    return bisect_left(with_experts, chunk.stop) - bisect_left(with_experts, chunk.first)


def _together(held: Sequence[Held]) -> Held:
    if len(held) == 1:
        return held[0]
    return Held(*(sum(getattr(one, field.name) for one in held) for field in fields(Held)))


def encoder_parameters(recipe: Recipe) -> Held:
    """Count the parameters of tower, projector and newline, which every rank holds, with their adapters."""
    trainable, lora = recipe.train.trainable, recipe.lora
    tower, projector = tower_parameters(recipe.model.vision), projector_parameters(recipe.model)
    beside_layer, beside_projector = tower_adapters(recipe.model, lora), projector_adapters(recipe.model, lora)
    learned = (beside_projector or projector) * (Part.PROJECTOR in trainable)
    learned += (tower.learning_layers * beside_layer or tower.learned) * (Part.VISION in trainable)
    return Held(tower.total + projector + tower.num_layers * beside_layer + beside_projector, learned)


def model_parameters(model: ModelConfig) -> dict[Part, int]:
    """Count the parameters of each part as published: adapters and the vocabulary's padding are left out.

    Args:
        model: The recipe's model.

    Returns:
        The counts; those of the newline are the projector's.
    """
    language = model.language
    tables = (1 if language.tied_embeddings else 2) * language.vocab_size + 1  # one more for the last norm
    with_experts = len(expert_layers(language))
    in_layers = layers_parameters(model, language.num_layers, with_experts) + expert_parameters(language, with_experts)
    return {
        Part.VISION: tower_parameters(model.vision).total,
        Part.PROJECTOR: projector_parameters(model),
        Part.LANGUAGE: in_layers + tables * language.hidden_size,
    }


def learned_parameters(recipe: Recipe) -> int:
    """Count the parameters of the whole model that learn; of a part with adapters only the adapters.

    Args:
        recipe: The recipe.

    Returns:
        The number over all ranks of one replica, each counted once.
    """
    found = encoder_parameters(recipe).learned
    if Part.LANGUAGE in recipe.train.trainable:
        whole = model_parameters(recipe.model)[Part.LANGUAGE]
        found += adapter_weights(recipe.model.language, recipe.lora) if recipe.lora.rank else whole
    return found


def adapter_parameters(recipe: Recipe) -> int:
    """Count the entries of all adapters of decoder, tower and projector; 0 without."""
    model, lora = recipe.model, recipe.lora
    encoder = model.vision.num_layers * tower_adapters(model, lora) + projector_adapters(model, lora)
    return adapter_weights(model.language, lora) + encoder


def parameters_of_chunk(recipe: Recipe, chunk: Chunk) -> Held:
    """Count the decoder's parameters of one chunk on a rank of its stage.

    Args:
        recipe: The recipe, whose layout has been checked.
        chunk: One of its chunks.

    Returns:
        The counts.
    """
    model, parallel = recipe.model, recipe.parallel
    layers, with_experts = chunk.stop - chunk.first, _layers_with_experts(recipe, chunk)
    experts = expert_parameters(model.language, with_experts, parallel.expert)
    tables = int(chunk.has_embedding) + int(chunk.has_head)
    if tables == 2 and model.language.tied_embeddings:
        tables = 1
    table = padded_vocabulary(model.language.vocab_size, parallel.tensor) // parallel.tensor
    total = layers_parameters(model, layers, with_experts, parallel.tensor) + experts
    total += tables * table * model.language.hidden_size
    total += chunk.has_head * model.language.hidden_size
    adapters = layers * _adapters(recipe, parallel)
    learned = 0
    if Part.LANGUAGE in recipe.train.trainable:
        learned = adapters if recipe.lora.rank else total
    return Held(total + adapters, learned, experts, experts if learned == total else 0)


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
