"""The bytes that a trained vision tower keeps of each view, and how many views at a time a budget of memory allows.

Per token, layer and number: 8 widths of the tower (the inputs and outputs of both norms, queries, keys, values and what
attention returns) and 2 of the MLP (before and after the activation), or 3 where the activation is a product whose
factor is kept too (`quick_gelu` without a kernel of its own). `tests/step/test_encoder_memory.py` compares this with
what autograd keeps.
"""

from __future__ import annotations

from typing import Final

from megatron_deepstack.config.choices import Activation
from megatron_deepstack.config.schema import ParallelConfig, VisionConfig
from megatron_deepstack.config.sizes import tokens_per_view, used_layers
from megatron_deepstack.config.traits.towers import tower_of

GIB: Final = 1 << 30


def view_bytes(vision: VisionConfig, element_bytes: int, *, fused: bool = False) -> int:
    """Return the bytes of activations that the layers of a tower keep of one view for the backward pass.

    Args:
        vision: The tower.
        element_bytes: Bytes of a number: 2 in bf16, 4 in float32.
        fused: Whether bias and activation are one kernel (`speed.activation_fusion`).

    Returns:
        Bytes, at least 1.
    """
    tokens = tokens_per_view(vision) + tower_of(vision).num_leading_tokens
    numbers = 8 * vision.hidden_size + kept_of_mlp(vision, fused=fused) * vision.ffn_hidden_size
    return max(1, tokens * used_layers(vision) * numbers * element_bytes)


def kept_of_mlp(vision: VisionConfig, *, fused: bool = False) -> int:
    """Return how many values the MLP of a layer keeps for each of its inner features.

    Args:
        vision: The tower.
        fused: Whether bias and activation are one kernel.

    Returns:
        2 or 3.
    """
    return 3 if vision.activation is Activation.QUICK_GELU and not fused else 2


def views_at_once(parallel: ParallelConfig, vision: VisionConfig, element_bytes: int, *, fused: bool = False) -> int:
    """Return how many views' activations of a trained tower are kept at a time.

    Args:
        parallel: The layout, which bounds either the number of views or their bytes.
        vision: The tower.
        element_bytes: Bytes of a number.
        fused: Whether bias and activation are one kernel.

    Returns:
        A number of views, at least 1 if their bytes are bounded; 0 for no bound.
    """
    if not parallel.encoder_memory_gib:
        return parallel.encoder_chunk_views
    return max(1, int(parallel.encoder_memory_gib * GIB) // view_bytes(vision, element_bytes, fused=fused))
