"""The visual encoder: ViT, projector, and the learned newline of any-resolution contexts.

It maps pixels to *rows*: features of the decoder's hidden size, view after view, then one newline row. Routes say
which row goes where; the encoder knows nothing of sequences, stages or stacks (except DeepStack-V's own).
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import LoraConfig, ModelConfig
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.config.traits.variants import StackSource
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.model.layers.lora import NO_ADAPTERS, WithAdapter, adapt_linears
from megatron_deepstack.model.layers.megatron_config import vision_config
from megatron_deepstack.model.layers.speed import PLAIN, Speed
from megatron_deepstack.model.vision.native import Mergers
from megatron_deepstack.model.vision.qformer import QFormers
from megatron_deepstack.model.vision.tower import build_tower
from megatron_deepstack.model.vision.vit import VitStacks
from megatron_deepstack.planning.exchange.vit_stacks import STACKS_IN_VIT, plan_vit_stacks


class Projector(torch.nn.Module):
    """Linear, GELU, Linear with biases: ViT width to decoder width (LLaVA's mlp2x_gelu)."""

    def __init__(self, width: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(width, hidden, dtype=dtype)
        self.fc2 = torch.nn.Linear(hidden, hidden, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., hidden)."""
        return self.fc2(torch.nn.functional.gelu(self.fc1(x)))


def build_projector(model: ModelConfig, dtype: torch.dtype) -> torch.nn.Module:
    """Return the module from the tower's features to rows, uninitialised.

    Args:
        model: The recipe's model.
        dtype: Dtype of its parameters.
    """
    if tower_of(model.vision).is_native:
        return Mergers(model.vision, model.language.hidden_size, dtype)
    if model.variant.traits.stack_source is StackSource.TAPS:
        return QFormers(model, dtype)
    return Projector(model.vision.hidden_size, model.language.hidden_size, dtype)


class VisualEncoder(MegatronModule):
    """Pixels to rows; replicated on every rank."""

    def __init__(
        self,
        model: ModelConfig,
        precision: Precision,
        groups: ProcessGroupCollection,
        speed: Speed = PLAIN,
        lora: LoraConfig = NO_ADAPTERS,
    ) -> None:
        """`groups` is the encoder's view of the world: data-parallel over everything."""
        config = vision_config(model.vision, precision, speed, lora)
        super().__init__(config=config)
        stacks = None
        if model.variant.traits.stacks_in_vit:
            stacks = VitStacks(slots=plan_vit_stacks(model).slots, views_per_image=1 + STACKS_IN_VIT)
        self.hidden_size = model.language.hidden_size
        self.vit = build_tower(config, model, groups, stacks)
        if lora.vision_targets and not any(isinstance(module, WithAdapter) for module in self.vit.modules()):
            raise ConfigError([f"lora.vision_targets: the tower {model.vision.kind} has no place for adapters; set []"])
        self.projector = build_projector(model, config.params_dtype)
        if lora.projector:
            adapt_linears(self.projector, lora)
        self.newline = None
        if model.variant.traits.has_newline:
            self.newline = torch.nn.Parameter(torch.empty(self.hidden_size, dtype=config.params_dtype))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """From the tower's features to rows. Not collective.

        Args:
            features: (N, P * P, C) of N views, or of N images where stacks enter the ViT; (N, P * P, states, C) where
                stacks come from Q-Formers; (N, 1 + K, C) of N patches of views of any size, with K taps.

        Returns:
            Rows (rows of all views + 1, H), the newline last; zero where the variant has none.
        """
        rows = self.projector(features).reshape(-1, self.hidden_size)
        newline = rows.new_zeros(1, self.hidden_size) if self.newline is None else self.newline[None]
        return torch.cat([rows, newline.to(rows.dtype)])
