"""DeepStack's vision tower: views of images to features, and the crops of an image to stacks.

In DeepStack-V the stacks are added in here, before layer `slots[k]` of the tower, and only the global views go on.

This file needs torch and transformers only; it is copied beside the weights.

Legend: N views, T tokens of a view (P with the leading one left out), C width of the tower.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_deepstack import DeepStackConfig, DeepStackVisionConfig

Grid = tuple[int, int]
"""Columns and rows of an image's crops."""


class DeepStackVisionEmbeddings(nn.Module):
    """Patches with positions, after the class token if there is one."""

    def __init__(self, config: DeepStackVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        num_tokens = (config.image_size // patch) ** 2 + int(config.has_class_token)
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=config.has_patch_bias)
        self.class_embedding = nn.Parameter(torch.zeros(width)) if config.has_class_token else None
        self.position_embedding = nn.Embedding(num_tokens, width)

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """(N, T, C)."""
        hidden_NTC = self.patch_embedding(pixels_N3HW.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            class_N1C = self.class_embedding.expand(len(hidden_NTC), 1, -1)
            hidden_NTC = torch.cat([class_N1C, hidden_NTC], dim=1)
        return hidden_NTC + self.position_embedding.weight


class DeepStackVisionAttention(nn.Module):
    """Attention of all tokens of a view to each other."""

    def __init__(self, config: DeepStackVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_NTC: Tensor) -> Tensor:
        """(N, T, C)."""
        heads = [
            linear(x_NTC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        ]
        mixed_NATD = F.scaled_dot_product_attention(*heads)
        return self.out_proj(mixed_NATD.transpose(1, 2).flatten(2))


class DeepStackVisionMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: DeepStackVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x_NTC: Tensor) -> Tensor:
        """(N, T, C)."""
        return self.fc2(self.act(self.fc1(x_NTC)))


class DeepStackVisionLayer(nn.Module):
    """A layer of the tower, with a norm before attention and before the MLP."""

    def __init__(self, config: DeepStackVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = DeepStackVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = DeepStackVisionMLP(config)

    def forward(self, x_NTC: Tensor) -> Tensor:
        """(N, T, C)."""
        x_NTC = x_NTC + self.self_attn(self.layer_norm1(x_NTC))
        return x_NTC + self.mlp(self.layer_norm2(x_NTC))


class DeepStackVisionEncoder(nn.Module):
    """The layers of the tower; `DeepStackVisionTower` runs them."""

    def __init__(self, config: DeepStackVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeepStackVisionLayer(config) for _ in range(config.num_hidden_layers))


class DeepStackVisionTower(nn.Module):
    """The vision tower up to the hidden state that gives the features; in DeepStack-V it takes the stacks."""

    def __init__(self, config: DeepStackConfig) -> None:
        super().__init__()
        vision: Any = config.vision_config
        self.sampler = config.sampler
        self.slots = config.slots if config.stacked_part == "vit" and config.stack_source != "nothing" else []
        self.num_leading = int(vision.has_class_token)
        chosen = config.vision_feature_layer
        self.num_used = chosen if chosen >= 0 else vision.num_hidden_layers + 1 + chosen
        self.embeddings = DeepStackVisionEmbeddings(vision)
        width, epsilon = vision.hidden_size, vision.layer_norm_eps
        self.pre_layrnorm = nn.LayerNorm(width, eps=epsilon) if vision.has_pre_norm else None  # its published name
        self.encoder = DeepStackVisionEncoder(vision)
        self.post_layernorm = nn.LayerNorm(width, eps=epsilon) if vision.has_post_norm else None

    def forward(self, pixels_N3HW: Tensor, grids: list[Grid]) -> Tensor:
        """Encode the views of all images.

        Args:
            pixels_N3HW: Normalised pixels.
            grids: Grid of each image.

        Returns:
            Features (views, P, C): those of all views, or in DeepStack-V of the global view of each image.
        """
        hidden_NTC = self.embeddings(pixels_N3HW)
        if self.pre_layrnorm is not None:
            hidden_NTC = self.pre_layrnorm(hidden_NTC)
        if not self.slots:
            hidden_NTC = self._run(hidden_NTC, 0, self.num_used)
        else:
            hidden_NTC = self._run_with_stacks(self._run(hidden_NTC, 0, self.slots[0]), grids)
        features_NPC = hidden_NTC[:, self.num_leading :]
        return features_NPC if self.post_layernorm is None else self.post_layernorm(features_NPC)

    def _run(self, hidden_NTC: Tensor, first: int, stop: int) -> Tensor:
        for layer in self.encoder.layers[first:stop]:
            hidden_NTC = layer(hidden_NTC)
        return hidden_NTC

    def _run_with_stacks(self, hidden_NTC: Tensor, grids: list[Grid]) -> Tensor:
        """The layers from the first slot on, for the global views alone; stacks after the features have no effect."""
        images = hidden_NTC.split([1 + columns * rows for columns, rows in grids])
        global_NTC = torch.stack([views[0] for views in images])
        stacks = [
            sample_stacks(views[1:, self.num_leading :], grid, self.sampler)
            for views, grid in zip(images, grids, strict=True)
        ]
        done = self.slots[0]
        for k, slot in enumerate(self.slots):
            if slot > self.num_used or slot >= len(self.encoder.layers):
                break
            global_NTC, done = self._run(global_NTC, done, slot), slot
            nothing = torch.zeros_like(global_NTC[0, self.num_leading :])
            stack_NPC = torch.stack([of_image[k] if k < len(of_image) else nothing for of_image in stacks])
            global_NTC = global_NTC + F.pad(stack_NPC, (0, 0, self.num_leading, 0))
        return self._run(global_NTC, done, self.num_used)


def mosaic(crops_NPC: Tensor, grid: Grid) -> Tensor:
    """Put crops together to one picture.

    Args:
        crops_NPC: Crops in raster order; P is the square of the side of a crop in tokens.
        grid: Their columns and rows.

    Returns:
        (rows * side, columns * side, C).
    """
    columns, rows = grid
    side = math.isqrt(crops_NPC.shape[1])
    tiles = crops_NPC.reshape(rows, columns, side, side, -1)
    return tiles.transpose(1, 2).reshape(rows * side, columns * side, -1)


def sample_stacks(crops_NPC: Tensor, grid: Grid, sampler: str) -> list[Tensor]:
    """Divide the crops of an image into as many stacks, which together hold every token once.

    Args:
        crops_NPC: Crops in raster order.
        grid: Their columns and rows.
        sampler: `2d` takes every n-th token in both directions, `1d` every n-th of the mosaic written line by line,
            `grid` one crop per stack.

    Returns:
        Stacks (P, C).
    """
    columns, rows = grid
    if sampler == "grid":
        return list(crops_NPC)
    picture = mosaic(crops_NPC, grid)
    if sampler == "1d":
        return [picture.flatten(0, 1)[k :: columns * rows] for k in range(columns * rows)]
    if sampler == "2d":
        return [picture[i::rows, j::columns].flatten(0, 1) for i in range(rows) for j in range(columns)]
    raise ValueError(f"sampler: found {sampler!r}, expected 2d, 1d or grid (config.json)")
