"""Floating-point operations of the model, counted from the recipe and the lengths of samples.

Each multiply-add of a matrix product counts as two operations. These are *model* FLOPs: what the mathematics needs,
whatever the layout computes in addition. A sequence counts with its own length, without padding. Causal attention
counts half of the square of the length. Recomputation does not count. Norms, activations and the injection (a millionth
of the rest) are left out.

A matrix costs one forward. If it learns, its gradient costs as much again. If something before it learns, the gradient
of its input also costs as much. So a part that learns costs three forwards, a frozen decoder after a projector that
learns costs two, and a frozen ViT costs one. A part with adapters is frozen itself; each adapter costs three forwards
of its own, and lets gradients through the part. The two products of attention have no weights and two inputs, so their
backward costs two forwards wherever a gradient passes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from megatron_deepstack.config.choices import Part
from megatron_deepstack.config.schema import LanguageConfig, LoraConfig, ModelConfig, ParallelConfig, VisionConfig
from megatron_deepstack.config.sizes import tokens_per_view, used_layers
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.config.traits.variants import StackSource
from megatron_deepstack.planning.budget.encoder_parameters import projector_adapters, tower_adapters
from megatron_deepstack.planning.budget.linears import attention_widths, layer_weights, linear_sizes, passed_weights
from megatron_deepstack.planning.exchange.vit_stacks import STACKS_IN_VIT, view_layers
from megatron_deepstack.planning.slots import stage_chunks
from megatron_deepstack.planning.views import ImageShape, ViewGrid

Lengths = TypeVar("Lengths", float, npt.NDArray[np.float64])


@dataclass(frozen=True, slots=True)
class EncoderWork:
    """What the encoder has to do for some images."""

    units: float = 0.0
    """Views, or images with all their views if stacks enter the ViT, or visual tokens if views have any size."""
    views: float = 0.0
    patches: float = 0.0
    """Patches of all views, before any are merged."""
    squares: float = 0.0
    """Sum of the squares of the patches of each frame, over which attention runs."""

    @classmethod
    def sum_of(cls, parts: Iterable[EncoderWork]) -> EncoderWork:
        """Return the work of several together."""
        numbers = [(one.units, one.views, one.patches, one.squares) for one in parts]
        return cls(*(sum(column) for column in zip(*numbers, strict=True)))

    @classmethod
    def of_units(cls, model: ModelConfig, units: float) -> EncoderWork:
        """Describe units of views of one size.

        Args:
            model: The recipe's model.
            units: Number of units.

        Returns:
            The work.
        """
        views = units * (1 + STACKS_IN_VIT if model.variant.traits.stacks_in_vit else 1)
        tokens = tokens_per_view(model.vision)
        return cls(units, views, views * tokens, views * float(tokens) ** 2)

    @classmethod
    def of_grids(cls, model: ModelConfig, grids: Sequence[ViewGrid]) -> EncoderWork:
        """Describe views of any size.

        Args:
            model: The recipe's model.
            grids: The patches of each view.

        Returns:
            The work.
        """
        return cls(
            float(sum(grid.num_tokens(model.vision.merge_size) for grid in grids)),
            float(len(grids)),
            float(sum(grid.num_patches for grid in grids)),
            float(sum(grid.num_patches * grid.height * grid.width for grid in grids)),
        )


def training_flops(
    model: ModelConfig,
    trainable: Collection[Part],
    lora: LoraConfig,
    lengths: Sequence[int],
    num_units: int,
    grids: Sequence[ViewGrid] = (),
) -> float:
    """Count the FLOPs of a step, forward and backward.

    Args:
        model: The recipe's model.
        trainable: Parts that learn.
        lora: Adapters; rank 0 for none.
        lengths: Tokens of each sample, including visual tokens, without padding.
        num_units: Number of units that are encoded: views, or images with all their views if stacks enter the ViT.
        grids: The patches of each unit, if views have any size.

    Returns:
        Operations, two per multiply-add, of all ranks together.
    """
    native = model.variant.traits.is_native
    work = EncoderWork.of_grids(model, grids) if native else EncoderWork.of_units(model, num_units)
    encoder = encoder_training_flops(model, trainable, lora, work)
    squares = sum(length * length for length in lengths)
    return encoder + decoder_training_flops(model.language, trainable, lora, sum(lengths), squares)


@dataclass(frozen=True, slots=True)
class _Passes:
    """How many forwards the parts of a tower cost in a step."""

    linears: int
    attention: int
    patches: int
    """Pixels want no gradient."""


_FROZEN, _LEARNED, _ADAPTED = _Passes(1, 1, 1), _Passes(3, 3, 2), _Passes(2, 3, 1)


def _tower_passes(trainable: Collection[Part], lora: LoraConfig) -> _Passes:
    if Part.VISION not in trainable:
        return _FROZEN
    return _ADAPTED if lora.rank and lora.vision_targets else _LEARNED


def encoder_training_flops(
    model: ModelConfig, trainable: Collection[Part], lora: LoraConfig, work: EncoderWork
) -> float:
    """Count a step's FLOPs of tower and projector, forward and backward, with their adapters.

    Args:
        model: The model.
        trainable: Parts that learn.
        lora: Adapters; a tower or projector that has some is frozen itself.
        work: What is encoded.

    Returns:
        Operations.
    """
    if not model.variant.traits.is_native:
        unit = vision_training_flops(model, trainable, lora) + _projector_training(model, trainable, lora)
        return work.units * unit
    vision, passes, part_learns = model.vision, _tower_passes(trainable, lora), Part.PROJECTOR in trainable
    tower = _native_layers(vision, work, passes) + passes.patches * _native_patches(vision, work)
    tower += 6 * work.patches * vision.num_layers * tower_adapters(model, lora)
    learned, flows = part_learns and not lora.projector, part_learns or Part.VISION in trainable
    adapters = 6 * work.units * projector_adapters(model, lora)
    return tower + (1 + learned + flows) * _mergers(model, work) + adapters


def encoder_flops(model: ModelConfig, work: EncoderWork) -> tuple[float, float]:
    """Count the FLOPs of encoding, forward.

    Args:
        model: The recipe's model.
        work: What is encoded.

    Returns:
        Operations of the tower, and of the projector. Attention is quadratic in the patches of a frame, so a large view
        costs more than several small ones of the same area.
    """
    if model.variant.traits.is_native:
        tower = _native_layers(model.vision, work) + _native_patches(model.vision, work)
        return tower, _mergers(model, work)
    return work.units * vision_training_flops(model, (), LoraConfig()), work.units * projector_flops(model)


def head_training_flops(
    language: LanguageConfig, trainable: Collection[Part], lora: LoraConfig, tokens: float
) -> float:
    """Count a step's FLOPs of the output layer, forward and backward.

    Args:
        language: The decoder.
        trainable: Parts that learn.
        lora: Adapters; rank 0 for none.
        tokens: Number of tokens.

    Returns:
        Operations.
    """
    learned = Part.LANGUAGE in trainable and lora.rank == 0
    return (2 + learned) * 2 * tokens * _head_weights(language)


def decoder_training_flops(
    language: LanguageConfig, trainable: Collection[Part], lora: LoraConfig, tokens: int, squares: int
) -> float:
    """Count a step's FLOPs of the decoder with its output layer, forward and backward.

    Args:
        language: The decoder.
        trainable: Parts that learn.
        lora: Adapters; rank 0 for none.
        tokens: Tokens of all samples, including visual tokens, without padding.
        squares: Sum of the squares of the samples' tokens, over which attention runs.

    Returns:
        Operations.
    """
    adapted = Part.LANGUAGE in trainable and lora.rank > 0
    learned = Part.LANGUAGE in trainable and not adapted
    matrices = 2 * tokens * (passed_weights(language) + _head_weights(language))
    attention = 2 * squares * attention_widths(language)[0]
    adapters = 2 * tokens * adapter_weights(language, lora) if adapted else 0
    return (2 + learned) * matrices + 3 * language.num_layers * attention + 3 * adapters


def vision_training_flops(model: ModelConfig, trainable: Collection[Part], lora: LoraConfig) -> float:
    """Count a step's FLOPs of the ViT for the views of one unit.

    Args:
        model: The model.
        trainable: Parts that learn; with none of them the forward pass alone is counted.
        lora: Adapters; a tower that has some is frozen itself.

    Returns:
        Operations.
    """
    passes, vision = _tower_passes(trainable, lora), model.vision
    views = 1 + STACKS_IN_VIT if model.variant.traits.stacks_in_vit else 1
    layers = view_layers(model, views, 1)
    adapters = 6 * _tower_tokens(vision) * tower_adapters(model, lora) if passes is _ADAPTED else 0
    return _layers_flops(vision, layers, passes) + layers * adapters + passes.patches * views * _patch_flops(vision)


def _projector_training(model: ModelConfig, trainable: Collection[Part], lora: LoraConfig) -> float:
    """Count a step's FLOPs of the projector for the rows of one view."""
    part_learns, below = Part.PROJECTOR in trainable, Part.VISION in trainable
    learned, flows = part_learns and not lora.projector, part_learns or below
    if model.variant.traits.stack_source is StackSource.TAPS:
        return (1 + learned + flows) * projector_flops(model) + 3 * _qformer_adapters(model, lora)
    tokens, hidden = tokens_per_view(model.vision), model.language.hidden_size
    first, second = 2 * tokens * model.vision.hidden_size * hidden, 2 * tokens * hidden * hidden
    adapters = 6 * tokens * projector_adapters(model, lora)
    return (1 + learned + below) * first + (1 + learned + flows) * second + adapters


def decoder_flops(language: LanguageConfig, seq_length: Lengths) -> Lengths:
    """Count the FLOPs of the decoder's forward pass, including the output layer.

    Args:
        language: The decoder.
        seq_length: Tokens of the sequence, or float64 of any shape.

    Returns:
        Operations for one sequence, or for each.
    """
    matrices = 2 * seq_length * (passed_weights(language) + _head_weights(language))
    return matrices + language.num_layers * _causal_attention(language, seq_length)


def view_flops(vision: VisionConfig) -> float:
    """Count the FLOPs of the forward pass of one view through the ViT layers whose output is used."""
    return _layers_flops(vision, used_layers(vision), _FROZEN) + _patch_flops(vision)


def unit_flops(model: ModelConfig, shape: ImageShape) -> float:
    """Count the FLOPs of encoding one unit of an image, forward, from its patches to its rows.

    Args:
        model: The recipe's model.
        shape: Columns and rows of the image's crops, or the patches of its one view.

    Returns:
        Operations. Attention is quadratic in the patches of a frame, so a large view costs more than several small
        ones of the same area.
    """
    if not isinstance(shape, ViewGrid):
        views = 1 + STACKS_IN_VIT if model.variant.traits.stacks_in_vit else 1
        return views * view_flops(model.vision) + projector_flops(model)
    return sum(encoder_flops(model, EncoderWork.of_grids(model, [shape])))


def _native_patches(vision: VisionConfig, work: EncoderWork) -> float:
    return 2 * work.patches * 3 * vision.temporal_patch_size * vision.patch_size**2 * vision.hidden_size


def _native_layers(vision: VisionConfig, work: EncoderWork, passes: _Passes = _FROZEN) -> float:
    c = vision.hidden_size
    linears = passes.linears * 2 * work.patches * (4 * c * c + 2 * c * vision.ffn_hidden_size)
    return vision.num_layers * (linears + passes.attention * 4 * work.squares * c)


def _mergers(model: ModelConfig, work: EncoderWork) -> float:
    vision = model.vision
    merged = vision.hidden_size * vision.merge_size**2
    merger = 2 * work.units * merged * (merged + model.language.hidden_size)
    return (1 + len(vision.taps)) * merger


def stage_weights(language: LanguageConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """Count the entries of the decoder's matrices that a token passes on each stage, which its time is proportional to.

    Args:
        language: The decoder.
        parallel: The layout.

    Returns:
        The number of entries of each pipeline stage, before tensor parallelism splits them.
    """
    held = [0] * parallel.pipeline
    for chunk in stage_chunks(language.num_layers, parallel):
        layers = sum(layer_weights(language, layer, active=True) for layer in range(chunk.first, chunk.stop))
        held[chunk.pp] += layers + chunk.has_head * _head_weights(language)
    return tuple(held)


def projector_flops(model: ModelConfig) -> float:
    """Count the FLOPs of the projector's forward pass for the tokens of one view of a fixed size."""
    if model.variant.traits.stack_source is StackSource.TAPS:
        return float(len(model.vision.taps) * _qformer(model))
    hidden = model.language.hidden_size
    return 2.0 * tokens_per_view(model.vision) * hidden * (model.vision.hidden_size + hidden)


def _qformer(model: ModelConfig) -> int:
    """Count the FLOPs of one Q-Former for one view: queries to queries, queries to patches, MLPs, and the last linear.

    Attention stays within a window, so its products are small beside the linears'.
    """
    qformer, c, patches = model.qformer, model.vision.hidden_size, tokens_per_view(model.vision)
    queries = patches // qformer.window_side**2 * qformer.query_side**2
    crossing = -(-qformer.num_layers // qformer.cross_attention_interval)
    among = 8 * queries * c * c + 4 * queries * qformer.query_side**2 * c
    across = 4 * (queries + patches) * c * c + 4 * queries * qformer.window_side**2 * c
    mlp = 4 * queries * c * qformer.ffn_hidden_size
    layers = qformer.num_layers * (among + mlp) + crossing * across
    return layers + 2 * queries * c * model.language.hidden_size


def _qformer_adapters(model: ModelConfig, lora: LoraConfig) -> float:
    """Count the FLOPs of one forward of all Q-Formers' adapters for one view; keys and values see patches."""
    if not lora.projector:
        return 0.0
    qformer, c, patches = model.qformer, model.vision.hidden_size, tokens_per_view(model.vision)
    queries = patches // qformer.window_side**2 * qformer.query_side**2
    crossing = -(-qformer.num_layers // qformer.cross_attention_interval)
    layers = qformer.num_layers * queries * (8 * c + 2 * (c + qformer.ffn_hidden_size))
    entries = layers + crossing * 4 * c * (queries + patches) + queries * (c + model.language.hidden_size)
    return 2.0 * lora.rank * len(model.vision.taps) * entries


def adapter_weights(language: LanguageConfig, lora: LoraConfig) -> int:
    """Count the entries of all adapters' matrices: rank x (inputs + outputs) for each adapted linear layer.

    Args:
        language: The decoder.
        lora: The adapters.

    Returns:
        The number of entries over all layers of the decoder.
    """
    sizes = linear_sizes(language)
    return language.num_layers * sum(lora.rank * sum(sizes[target]) for target in lora.targets)


def _head_weights(language: LanguageConfig) -> int:
    return language.hidden_size * language.vocab_size


def _causal_attention(language: LanguageConfig, length: Lengths) -> Lengths:
    """Count the FLOPs of scores and weighted values in one layer, which are half of 4 x length^2 x width."""
    return 2 * length * length * attention_widths(language)[0]


def _tower_tokens(vision: VisionConfig) -> int:
    """Count the tokens of a view of a fixed size in the tower's layers."""
    return tokens_per_view(vision) + tower_of(vision).num_leading_tokens


def _layers_flops(vision: VisionConfig, num_layers: float, passes: _Passes) -> float:
    c, tokens = vision.hidden_size, _tower_tokens(vision)
    linears = passes.linears * 2 * tokens * (4 * c * c + 2 * c * vision.ffn_hidden_size)
    return num_layers * (linears + passes.attention * 4 * tokens * tokens * c)


def _patch_flops(vision: VisionConfig) -> float:
    return 2 * tokens_per_view(vision) * 3 * vision.patch_size**2 * vision.hidden_size
