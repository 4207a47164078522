"""Numbers that a recipe's sizes determine, each derived here and nowhere else.

They are functions, not fields that might disagree with what they are derived from.
"""

from __future__ import annotations

from math import prod

from megatron_deepstack.config.schema import LanguageConfig, ParallelConfig, VisionConfig


def head_width(language: LanguageConfig) -> int:
    """Width of one attention head of the decoder."""
    return language.head_dim if language.head_dim is not None else language.hidden_size // language.num_heads


def num_kv_heads(language: LanguageConfig) -> int:
    """Number of key/value heads of the decoder."""
    return language.num_kv_heads if language.num_kv_heads is not None else language.num_heads


def used_layers(vision: VisionConfig) -> int:
    """ViT layers that must run for the selected feature, which is what would enter the layer of that number.

    `select_layer` counts as Hugging Face does: state 0 enters layer 0, state -1 leaves the last layer.
    """
    return vision.num_layers + 1 + vision.select_layer if vision.select_layer < 0 else vision.select_layer


def tokens_per_side(vision: VisionConfig) -> int:
    """P: patches along one side of a view."""
    return vision.image_size // vision.patch_size


def tokens_per_view(vision: VisionConfig) -> int:
    """Feature rows that the encoder returns for a view; a class token is not among them."""
    return tokens_per_side(vision) ** 2


def sequence_multiple(parallel: ParallelConfig) -> int:
    """What a sequence's length must be a multiple of.

    Context parallelism splits it into two pieces a rank, and sequence parallelism each of these over tensor ranks.
    """
    over_tensor = parallel.tensor if parallel.sequence_parallel else 1
    return prod((over_tensor, 2 * parallel.context if parallel.context > 1 else 1))
