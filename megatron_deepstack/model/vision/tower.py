"""What the encoder and the step need of a vision tower, and which module a kind of tower is built as.

Towers of fixed patches and learned positions are all `VisionTransformer`s, told apart by their traits, and those for
views of any size are `NativeTower`s. A tower of another form registers a module of its own: the rest of the system sees
a `Tower`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.config.schema import ModelConfig, VisionConfig
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.model.layers.megatron_config import TowerConfig
from megatron_deepstack.model.vision.native import NativeTower
from megatron_deepstack.model.vision.views import Views
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

    def features(self, views: Views) -> torch.Tensor:
        """Features of one or more views, on the tower's device.

        The first dimension has an entry for each view, for each image where stacks enter the tower, or for each patch
        where views have any size.
        """
        ...

    def no_features(self) -> torch.Tensor:
        """What `features` would return for no view: the first dimension is 0."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All parameters."""
        ...

    def unused_layers(self) -> list[torch.nn.Module]:
        """Layers after the selected feature, which never learn."""
        ...


TowerBuilder = Callable[[TowerConfig, ModelConfig, ProcessGroupCollection, VitStacks | None], Any]
"""(Megatron's config of the tower, the recipe's model, the encoder's groups, its own stacks) to a Tower."""

_builders: dict[str, TowerBuilder] = {}


def register_tower_module(kind: str, builder: TowerBuilder) -> None:
    """Build towers of a kind by a module of another program. Call it on every rank, before the model is built.

    Args:
        kind: Its name, registered with `config.traits.towers.register_tower`.
        builder: Makes the module, which must be a `Tower`.
    """
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
    if tower_of(model.vision).is_native and model.vision.kind not in _builders:
        return NativeTower(config, model, groups)
    return _builders.get(model.vision.kind, VisionTransformer)(config, model, groups, stacks)
