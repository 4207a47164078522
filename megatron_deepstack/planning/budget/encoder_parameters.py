"""The exact number of parameters of tower, projector and newline, which every rank holds whole.

There are two forms of tower (views of one size, views of any size) and three of projector: two linears, mergers of
neighbouring patches, and window Q-Formers. A tower that another package builds with a module of its own is counted as
one for views of one size.

Legend: C width of the tower, f its MLP, H width of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_deepstack.config.choices import LoraTarget
from megatron_deepstack.config.schema import LoraConfig, ModelConfig, VisionConfig
from megatron_deepstack.config.sizes import tokens_per_view, used_layers
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.config.traits.variants import StackSource


@dataclass(frozen=True, slots=True)
class TowerCount:
    """Parameters of a tower."""

    layer: int
    """Of one transformer layer."""
    around: int
    """Of patches, positions, and norms outside the layers."""
    num_layers: int
    num_used_layers: int
    """Layers before the feature, the only ones that can learn."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.num_layers * self.layer + self.around

    @property
    def learned(self) -> int:
        """Those that learn if the tower does."""
        return self.learning_layers * self.layer + self.around

    @property
    def learning_layers(self) -> int:
        """Number of layers that learn if the tower does."""
        return min(self.num_used_layers, self.num_layers)


def tower_parameters(vision: VisionConfig) -> TowerCount:
    """Count the parameters of a vision tower.

    Args:
        vision: The tower.

    Returns:
        The counts.
    """
    c, f, traits = vision.hidden_size, vision.ffn_hidden_size, tower_of(vision)
    layer = 4 * (c + 1) * c + (c + 1) * f + (f + 1) * c + 4 * c
    if traits.is_native:
        patch = 3 * vision.temporal_patch_size * vision.patch_size**2 + 1
        around, used = (patch + (vision.num_positions or 0)) * c, vision.num_layers
    else:
        vectors = tokens_per_view(vision) + 2 * traits.num_leading_tokens + int(traits.has_patch_bias)
        vectors += 2 * (int(traits.has_pre_norm) + int(traits.has_post_norm))
        around, used = (3 * vision.patch_size**2 + vectors) * c, used_layers(vision)
    return TowerCount(layer, around, vision.num_layers, used)


def projector_parameters(model: ModelConfig) -> int:
    """Count the parameters between the tower and the decoder, with the learned newline where there is one.

    Args:
        model: The recipe's model.

    Returns:
        The number; all of them learn if the projector does.
    """
    vision, c, h = model.vision, model.vision.hidden_size, model.language.hidden_size
    newline = h * model.variant.traits.has_newline
    if tower_of(vision).is_native:
        block = c * vision.merge_size**2
        merger = (block + 1) * block + (block + 1) * h
        return merger + 2 * c + len(vision.taps) * (merger + 2 * block) + newline
    if model.variant.traits.stack_source is StackSource.TAPS:
        return len(vision.taps) * _qformer(model) + newline
    return (c + 1) * h + (h + 1) * h + newline


def tower_adapters(model: ModelConfig, lora: LoraConfig) -> int:
    """Count the parameters of the adapters of one of the tower's layers.

    Args:
        model: The recipe's model.
        lora: Its adapters.

    Returns:
        The number; 0 without adapters.
    """
    c, f = model.vision.hidden_size, model.vision.ffn_hidden_size
    widths = {
        LoraTarget.QKV: 4 * c,
        LoraTarget.ATTENTION_OUTPUT: 2 * c,
        LoraTarget.MLP_IN: c + f,
        LoraTarget.MLP_OUT: f + c,
    }
    return lora.rank * sum(widths[target] for target in lora.vision_targets)


def projector_adapters(model: ModelConfig, lora: LoraConfig) -> int:
    """Count the parameters of the adapters of the projector's linears.

    Args:
        model: The recipe's model.
        lora: Its adapters.

    Returns:
        The number; 0 without adapters.
    """
    if not lora.projector:
        return 0
    vision, c, h = model.vision, model.vision.hidden_size, model.language.hidden_size
    if tower_of(vision).is_native:
        block = c * vision.merge_size**2
        return lora.rank * (1 + len(vision.taps)) * (3 * block + h)
    if model.variant.traits.stack_source is StackSource.TAPS:
        qformer = model.qformer
        attentions = qformer.num_layers + -(-qformer.num_layers // qformer.cross_attention_interval)
        mlps = qformer.num_layers * 2 * (c + qformer.ffn_hidden_size)
        return lora.rank * len(vision.taps) * (attentions * 8 * c + mlps + c + h)
    return lora.rank * (c + 3 * h)


def _qformer(model: ModelConfig) -> int:
    """Count one Q-Former: attention to queries and, in some layers, to patches, an MLP, queries, positions, norms."""
    qformer, c = model.qformer, model.vision.hidden_size
    attention, f = 4 * (c + 1) * c + 2 * c, qformer.ffn_hidden_size
    crossing = -(-qformer.num_layers // qformer.cross_attention_interval)
    layers = (qformer.num_layers + crossing) * attention + qformer.num_layers * ((c + 1) * f + (f + 1) * c + 2 * c)
    vectors = qformer.query_side**2 + qformer.window_side**2 + 4
    return layers + vectors * c + (c + 1) * model.language.hidden_size
