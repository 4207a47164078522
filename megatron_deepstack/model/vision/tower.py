"""What the encoder and the step need of a vision tower, and which module a kind of tower is built as.

Towers of fixed patches and learned positions are all `VisionTransformer`s, told apart by their traits. A tower of
another form, such as one for views of any size, registers a module of its own: the rest of the system sees a `Tower`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.config.schema import ModelConfig, VisionConfig
from megatron_deepstack.model.layers.megatron_config import TowerConfig
from megatron_deepstack.model.vision.vit import VisionTransformer, VitStacks


class Tower(Protocol):
    """A module that makes features of views; the whole of it is on every rank.

    Legend: N views, P patches per side, C width.
    """

    vision: VisionConfig
    config: TransformerConfig
    """Says the dtype of its parameters."""
    stacks: VitStacks | None
    """Where it adds stacks itself, and how many views of an image it then encodes together."""
    mean: torch.Tensor
    """A buffer on the module's device."""

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, image, image, 3) to normalised (N, 3, image, image) in the parameters' dtype."""
        ...

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, image, image) normalised to features (N, P * P, C); with stacks (N / views of an image, P * P, C)."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All parameters."""
        ...

    def unused_layers(self) -> list[torch.nn.Module]:
        """Layers that the selected feature does not pass, which never learn."""
        ...


TowerBuilder = Callable[[TowerConfig, ModelConfig, ProcessGroupCollection, VitStacks | None], Any]
"""(Megatron's config of the tower, the recipe's model, the encoder's groups, its own stacks) to a Tower."""

_builders: dict[str, TowerBuilder] = {}


def register_tower_module(kind: str, builder: TowerBuilder) -> None:
    """Build towers of `kind`, a name registered with `config.traits.towers`, by `builder`; call it on every rank."""
    _builders[kind] = builder


def build_tower(
    config: TowerConfig, model: ModelConfig, groups: ProcessGroupCollection, stacks: VitStacks | None
) -> Any:
    """The recipe's tower, uninitialised. Not collective.

    Args:
        config: Megatron's config of the tower.
        model: The recipe's model.
        groups: The encoder's groups, in which it is not split.
        stacks: Where the tower adds stacks itself, or None.

    Returns:
        A module that is a `Tower`.
    """
    return _builders.get(model.vision.kind, VisionTransformer)(config, model, groups, stacks)
