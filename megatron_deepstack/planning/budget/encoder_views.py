"""The bytes that a trained vision tower keeps of each view, and how much at a time a budget of memory allows.

Per token, layer and number: 8 widths of the tower (the inputs and outputs of both norms, queries, keys, values and what
attention returns) and 2 of the MLP (before and after the activation), or 3 where the activation is a product whose
factor is kept too (`quick_gelu` without a kernel of its own). A tower for views of any size keeps 3 widths more
(rotated queries and keys, and what attention returns once more, put together from its frames) and 4 of one head (sines
and cosines for queries and keys).
`tests/step/test_encoder_memory.py` compares this with what autograd keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from megatron_deepstack.config.choices import Activation
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, VisionConfig
from megatron_deepstack.config.sizes import tokens_per_view, used_layers
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.planning.exchange.vit_stacks import STACKS_IN_VIT, view_layers

GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class AtOnce:
    """How much of a trained tower's work may keep its activations at a time. 0 sets no bound; at most one is set."""

    views: int = 0
    patches: int = 0
    """For views of any size. A view with more patches than this is taken by itself."""

    def cuts(self, patches: Sequence[int]) -> list[int]:
        """Divide views, in order, into groups that are encoded one after another.

        Args:
            patches: Number of patches of each view.

        Returns:
            Where each group begins, and the number of views; one 0 if there are no views.
        """
        found, held = [0], 0
        for view, size in enumerate(patches):
            full = view - found[-1] == self.views if self.views else 0 < self.patches < held + size
            if full and view > found[-1]:
                found.append(view)
                held = 0
            held += size
        return found + [len(patches)] * bool(patches)

    def share(self, views: float, patches: float) -> float:
        """Return the share of a rank's work whose activations are alive at a time.

        Args:
            views: Number of its views.
            patches: Number of patches of all of them.
        """
        if self.views and views:
            return min(self.views / views, 1.0)
        if self.patches and patches:
            return min(self.patches / patches, 1.0)
        return 1.0


def token_bytes(vision: VisionConfig, element_bytes: int, *, fused: bool = False) -> int:
    """Return the bytes of activations that the layers of a tower keep of one token for the backward pass.

    Args:
        vision: The tower.
        element_bytes: Bytes of a number: 2 in bf16, 4 in float32.
        fused: Whether bias and activation are one kernel (`speed.activation_fusion`).

    Returns:
        Bytes, at least 1. A token is a patch, or a leading token of a view.
    """
    native, width = tower_of(vision).is_native, vision.hidden_size
    numbers = 11 * width + 4 * width // vision.num_heads if native else 8 * width
    numbers += kept_of_mlp(vision, fused=fused) * vision.ffn_hidden_size
    return max(1, (vision.num_layers if native else used_layers(vision)) * numbers * element_bytes)


def view_bytes(vision: VisionConfig, element_bytes: int, *, fused: bool = False) -> int:
    """Return the bytes of activations that the layers of a tower for views of one size keep of one view.

    Args:
        vision: The tower.
        element_bytes: Bytes of a number: 2 in bf16, 4 in float32.
        fused: Whether bias and activation are one kernel (`speed.activation_fusion`).

    Returns:
        Bytes, at least 1.
    """
    tokens = tokens_per_view(vision) + tower_of(vision).num_leading_tokens
    return tokens * token_bytes(vision, element_bytes, fused=fused)


def kept_of_mlp(vision: VisionConfig, *, fused: bool = False) -> int:
    """Return how many values the MLP of a layer keeps for each of its inner features.

    Args:
        vision: The tower.
        fused: Whether bias and activation are one kernel.

    Returns:
        2 or 3.
    """
    return 3 if vision.activation is Activation.QUICK_GELU and not fused else 2


def kept_at_once(model: ModelConfig, parallel: ParallelConfig, element_bytes: int, *, fused: bool = False) -> AtOnce:
    """Return how much of a trained tower's work keeps its activations at a time.

    Args:
        model: The recipe's model.
        parallel: The layout, which bounds either the number of views or their bytes.
        element_bytes: Bytes of a number.
        fused: Whether bias and activation are one kernel.

    Returns:
        A number of views; or of patches, if bytes are bounded and views have any size. At least 1 if there is a bound.
    """
    if not parallel.encoder_memory_gib:
        return AtOnce(views=parallel.encoder_chunk_views)
    budget, vision = int(parallel.encoder_memory_gib * GIB), model.vision
    if tower_of(vision).is_native:
        return AtOnce(patches=max(1, budget // token_bytes(vision, element_bytes, fused=fused)))
    each = view_bytes(vision, element_bytes, fused=fused)
    if model.variant.traits.stacks_in_vit:  # of an image's views most pass the first layers alone
        views = 1 + STACKS_IN_VIT
        each = -(-each * int(view_layers(model, views, 1)) // (views * used_layers(vision)))
    return AtOnce(views=max(1, budget // each))
