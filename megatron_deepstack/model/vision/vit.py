"""A vision transformer with fixed positions on Megatron layers, with DeepStack-V's stacks before chosen layers.

It runs only the layers whose output is used (CLIP's feature is hidden state -2, so the last layer has no influence on
the result). For DeepStack-V, global view and crops share the layers before the first slot; then the crops' patch tokens
are sampled into stacks, and only the global view goes on (paper, section 3.3).

Legend: N views, P patches per side, T tokens per view (P * P and any class token), C width, U images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.config.sizes import tokens_per_side, tokens_per_view, used_layers
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.model.layers.megatron_config import TowerConfig
from megatron_deepstack.model.layers.specs import respect_no_grad, vit_layer
from megatron_deepstack.model.vision.views import Views
from megatron_deepstack.planning.exchange.samplers import sample_mosaic
from megatron_deepstack.planning.views import FIXED_GRID


@dataclass(frozen=True, slots=True)
class VitStacks:
    """DeepStack-V's injection: stack k is added to the global view's patch tokens before ViT layer `slots[k]`."""

    slots: tuple[int, ...]
    views_per_image: int


class VisionTransformer(MegatronModule):
    """Patch embedding, position embedding, transformer layers; every rank holds all of it.

    What stands around the layers (class token, biases, norms) is what the tower's entry in `config.traits.towers` says.
    """

    def __init__(
        self,
        config: TowerConfig,
        model: ModelConfig,
        groups: ProcessGroupCollection,
        stacks: VitStacks | None,
    ) -> None:
        super().__init__(config=config)
        vision = model.vision
        side = tokens_per_side(vision)
        dtype = config.params_dtype
        traits = tower_of(vision)
        self.vision, self.stacks = vision, stacks
        self.num_leading = traits.num_leading_tokens
        self.num_used_layers = used_layers(vision)
        self.taps = tuple(sorted(set(vision.taps)))
        """Layers whose outputs are the features, in place of the one selected state."""
        self.patch_embedding = torch.nn.Conv2d(  # without padding: pixels beyond whole patches are not seen
            3,
            vision.hidden_size,
            kernel_size=vision.patch_size,
            stride=vision.patch_size,
            bias=traits.has_patch_bias,
            dtype=dtype,
        )
        num_tokens = side * side + self.num_leading
        self.position_embedding = torch.nn.Parameter(torch.empty(num_tokens, vision.hidden_size, dtype=dtype))
        if traits.has_class_token:
            self.class_embedding = torch.nn.Parameter(torch.empty(vision.hidden_size, dtype=dtype))
        self.pre_norm = self._norm(dtype) if traits.has_pre_norm else torch.nn.Identity()
        self.post_norm = self._norm(dtype) if traits.has_post_norm else torch.nn.Identity()
        self.decoder = TransformerBlock(
            config=config.for_layers(),
            spec=vit_layer(engine=config.engine_layers, activation=config.fused_activation, lora=config.adapters),
            pre_process=True,
            post_process=False,
            pg_collection=groups,
        )
        respect_no_grad(self.decoder)
        if stacks is not None:
            self.register_buffer("stack_index", self._stack_index(model, stacks), persistent=False)
        self.register_buffer("mean", torch.tensor(vision.mean)[:, None, None] * 255.0, persistent=False)
        self.register_buffer("std", torch.tensor(vision.std)[:, None, None] * 255.0, persistent=False)

    def _norm(self, dtype: torch.dtype) -> torch.nn.LayerNorm:
        return torch.nn.LayerNorm(self.vision.hidden_size, eps=self.vision.layernorm_epsilon, dtype=dtype)

    @staticmethod
    def _stack_index(model: ModelConfig, stacks: VitStacks) -> torch.Tensor:
        """(stacks, P * P) index into an image's crops' patch tokens, (crops * P * P,)."""
        side = tokens_per_side(model.vision)
        crop, token = sample_mosaic(model.stacks.sampler, side, FIXED_GRID)
        index = torch.from_numpy(crop * side * side + token)
        return index[: len(stacks.slots)]

    def unused_layers(self) -> list[torch.nn.Module]:
        """Layers after the one whose output is the selected feature."""
        return list(self.decoder.layers[self.num_used_layers :])

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, image, image, 3) to normalised (N, 3, image, image) in the model's dtype, on its device."""
        x = pixels.to(self.mean.device, non_blocking=True).permute(0, 3, 1, 2).float()
        return ((x - self.mean) / self.std).to(self.config.params_dtype)

    def no_features(self) -> torch.Tensor:
        """Features of no view, (0, P * P, C); with taps (0, P * P, taps, C)."""
        taps = (len(self.taps),) if self.taps else ()
        shape = (0, tokens_per_view(self.vision), *taps, self.vision.hidden_size)
        return torch.zeros(shape, dtype=self.config.params_dtype, device=self.mean.device)

    def features(self, views: Views) -> torch.Tensor:
        """Features of one or more views, (N, P * P, C); with stacks (N / views of an image, P * P, C)."""
        pixels = views.pixels
        images = self.normalise(pixels) if pixels.dtype is torch.uint8 else pixels.to(self.mean.device)
        return self(images.to(self.config.params_dtype))  # type: ignore[no-any-return]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, image, image) normalised -> patch features (N, P * P, C); with stacks (N / views, P * P, C).

        With taps (N, P * P, taps, C): the outputs of these layers, ascending.
        """
        x_NTC = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        if self.num_leading:
            x_NTC = torch.cat([self.class_embedding.expand(len(x_NTC), 1, -1), x_NTC], dim=1)
        x_NTC = self.pre_norm(x_NTC + self.position_embedding)
        if self.taps:
            states = self._tapped(x_NTC.transpose(0, 1).contiguous())
            return torch.stack([self.post_norm(x[self.num_leading :].transpose(0, 1)) for x in states], dim=2)
        x_TNC = self._run_layers(x_NTC.transpose(0, 1).contiguous())
        return self.post_norm(x_TNC[self.num_leading :].transpose(0, 1))

    def _tapped(self, x_TNC: torch.Tensor) -> list[torch.Tensor]:
        states = []
        for index, layer in enumerate(self.decoder.layers[: self.taps[-1] + 1]):
            x_TNC, _ = layer(hidden_states=x_TNC, attention_mask=None)
            if index in self.taps:
                states.append(x_TNC)
        return states

    def _run_layers(self, x_TNC: torch.Tensor) -> torch.Tensor:
        stacks_KMUC = None
        for index, layer in enumerate(self.decoder.layers[: self.num_used_layers + 1]):
            if self.stacks is not None:
                if index == self.stacks.slots[0]:
                    x_TNC, stacks_KMUC = self._split(x_TNC)
                for k, slot in enumerate(self.stacks.slots):
                    if slot == index:
                        assert stacks_KMUC is not None
                        x_TNC = self._add(x_TNC, stacks_KMUC[k])
            if index < self.num_used_layers:
                x_TNC, _ = layer(hidden_states=x_TNC, attention_mask=None)
        return x_TNC

    def _split(self, x_TNC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Global views (T, U, C), and stacks (K, P * P, U, C) sampled from the crops' patch tokens."""
        assert self.stacks is not None
        tokens, _, width = x_TNC.shape
        x_TUVC = x_TNC.reshape(tokens, -1, self.stacks.views_per_image, width)
        crops_VMUC = x_TUVC[self.num_leading :, :, 1:].permute(2, 0, 1, 3)
        flat = crops_VMUC.reshape(-1, x_TUVC.shape[1], width)
        return x_TUVC[:, :, 0].contiguous(), flat[self.stack_index]

    def _add(self, x_TUC: torch.Tensor, stack_MUC: torch.Tensor) -> torch.Tensor:
        """The stack on the patch tokens; the class token is untouched."""
        first = self.num_leading
        return torch.cat([x_TUC[:first], x_TUC[first:] + stack_MUC])
