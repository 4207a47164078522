"""Numbers that a recipe's sizes determine, each derived here and nowhere else.

They are functions and not fields, since a field could disagree with the numbers that it is derived from.
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm, prod

from megatron_deepstack.config.choices import Recompute, RecomputeModule
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, ParallelConfig, VisionConfig

_VOCABULARY_MULTIPLE = 128


def head_width(language: LanguageConfig) -> int:
    """Width of one attention head of the decoder."""
    return language.head_dim if language.head_dim is not None else language.hidden_size // language.num_heads


def num_kv_heads(language: LanguageConfig) -> int:
    """Number of key/value heads of the decoder."""
    return language.num_kv_heads if language.num_kv_heads is not None else language.num_heads


def recomputed_modules(parallel: ParallelConfig) -> tuple[RecomputeModule, ...]:
    """Parts of each decoder layer that are computed again by themselves; none under other kinds of recomputation."""
    return parallel.recompute_modules if parallel.recompute is Recompute.SELECTIVE else ()


def padded_vocabulary(vocab_size: int, tensor_ranks: int) -> int:
    """V: the vocabulary rounded up so that tensor cores and the ranks divide it; equal for all usual layouts.

    Args:
        vocab_size: Tokens of the vocabulary.
        tensor_ranks: Size of the tensor-parallel axis.

    Returns:
        Rows of the embedding, on all tensor-parallel ranks together.
    """
    multiple = lcm(_VOCABULARY_MULTIPLE, tensor_ranks)
    return -(-vocab_size // multiple) * multiple


def expert_layers(language: LanguageConfig) -> tuple[int, ...]:
    """Layers of the decoder that have experts, counted from 0, in ascending order."""
    if not language.num_experts:
        return ()
    interval, dense = language.expert_interval, language.dense_layers
    found = range(interval - 1, language.num_layers, interval)
    return tuple(n for n in found if n not in dense) if dense else tuple(found)


def used_layers(vision: VisionConfig) -> int:
    """Number of ViT layers that must run to compute the selected feature.

    `select_layer` is counted as in Hugging Face: state 0 is the input of layer 0, and state -1 is the output of the
    last layer. So the result is also the 0-based number of the layer whose input the feature is.
    """
    return vision.num_layers + 1 + vision.select_layer if vision.select_layer < 0 else vision.select_layer


def tokens_per_side(vision: VisionConfig) -> int:
    """Number of patches along one side of a view; P in formulae."""
    return vision.image_size // vision.patch_size


def tokens_per_view(vision: VisionConfig) -> int:
    """Number of feature rows that the encoder returns for a view; a class token is not counted."""
    return tokens_per_side(vision) ** 2


def sample_multiple(parallel: ParallelConfig) -> int:
    """Number of tokens of which the length of each sample of a pack must be a multiple.

    Context parallelism splits each sample into two pieces per rank, so that each rank has the same share of every one.
    """
    return 2 * parallel.context if parallel.context > 1 else 1


def resampled_side(model: ModelConfig) -> int:
    """Number of tokens along one side of a view after a window Q-Former."""
    return tokens_per_side(model.vision) // model.qformer.window_side * model.qformer.query_side


def smallest_context(model: ModelConfig) -> int:
    """Number of positions that the whole image takes at least; 0 where views have any size."""
    if model.variant.traits.is_native:
        return 0
    if model.variant.traits.has_base_rows:
        return tokens_per_view(model.vision)
    return resampled_side(model) ** 2


def sequence_multiple(parallel: ParallelConfig) -> int:
    """Number of tokens of which the length of a sequence must be a multiple.

    Context parallelism splits a sequence into two pieces per rank, and sequence parallelism splits what each of these
    ranks holds over the tensor-parallel ranks.
    """
    over_tensor = parallel.tensor if parallel.sequence_parallel else 1
    return prod((over_tensor, 2 * parallel.context if parallel.context > 1 else 1))


def answering_layout(parallel: ParallelConfig) -> ParallelConfig:
    """Return the layout in which a run answers questions, token by token.

    A step is one token wide, so the sequence is not split; and tensor-parallel ranks then hold the same tokens, so each
    rank has all experts of its layers. Nothing is kept for a backward pass.

    Args:
        parallel: The layout in which it was trained.

    Returns:
        The same ranks with the same layers.
    """
    return replace(parallel, sequence_parallel=False, expert=1, recompute=Recompute.NONE, offload_layers=0)


def nearest_divisor(size: int, wanted: int) -> int:
    """Find the divisor of a size that is nearest to a wanted number.

    Args:
        size: The number to divide, 1 or more.
        wanted: The number to be near to, 1 or more.

    Returns:
        The nearest divisor, at most `2 * wanted`; the smaller one of two that are equally near.
    """
    candidates = [divisor for divisor in range(1, min(size, 2 * wanted) + 1) if size % divisor == 0]
    return min(candidates, key=lambda divisor: abs(divisor - wanted))
