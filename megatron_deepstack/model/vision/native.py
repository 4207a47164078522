"""A vision tower for views of any size, as Qwen3-VL's, on Megatron layers.

A view is cut into patches, which a matrix product embeds (a 3-D convolution would compute the same, several times
slower on some GPUs). Positions come from a square table of learned vectors, interpolated to the size of the view, and
queries and keys turn by line and column. The patches of all views form one sequence, in which each patch sees
only the patches of its own frame. The features are the states after the tapped layers and after the last one.

Patches are ordered so that those which a merger joins are neighbours: block by block, and line by line within a block.

Legend: N patches of all views, C width, K taps, T frames of a patch, P side of a patch, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_deepstack.config.schema import ModelConfig, VisionConfig
from megatron_deepstack.model.layers.attention import Packs
from megatron_deepstack.model.layers.megatron_config import TowerConfig
from megatron_deepstack.model.layers.specs import framed_vit_layer, respect_no_grad
from megatron_deepstack.model.vision.views import Views
from megatron_deepstack.planning.views import ViewGrid
from megatron_deepstack.platform.compute.upload import upload


class PatchEmbedding(torch.nn.Module):
    """A linear over the values of a patch, whose weight has the shape of a 3-D convolution, as published."""

    def __init__(self, patch: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
        """`patch` is channels, frames, height and width of a patch."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(width, *patch, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(N, values of a patch) to (N, width)."""
        return torch.nn.functional.linear(patches, self.weight.flatten(1), self.bias)


class NativeTower(MegatronModule):
    """Patch embedding, interpolated and rotary positions, transformer layers; every rank holds all of it."""

    stacks = None

    def __init__(self, config: TowerConfig, model: ModelConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        vision, dtype = model.vision, config.params_dtype
        assert vision.num_positions is not None, "config.check asks for it"
        self.vision = vision
        self.taps = tuple(sorted(vision.taps))
        width, patch = vision.hidden_size, vision.patch_size
        self.patch_embedding = PatchEmbedding((3, vision.temporal_patch_size, patch, patch), width, dtype)
        self.position_embedding = torch.nn.Parameter(torch.empty(vision.num_positions, width, dtype=dtype))
        self.decoder = TransformerBlock(
            config=config.for_layers(),
            spec=framed_vit_layer(
                engine=config.engine_layers, activation=config.fused_activation, lora=config.adapters
            ),
            pre_process=True,
            post_process=False,
            pg_collection=groups,
        )
        respect_no_grad(self.decoder)
        self.register_buffer("mean", torch.tensor(vision.mean)[:, None, None] * 255.0, persistent=False)
        self.register_buffer("std", torch.tensor(vision.std)[:, None, None] * 255.0, persistent=False)

    def unused_layers(self) -> list[torch.nn.Module]:
        """None: the base rows come from the last layer."""
        return []

    def no_features(self) -> torch.Tensor:
        """Features of no view, (0, 1 + K, C)."""
        shape = (0, 1 + len(self.taps), self.vision.hidden_size)
        return torch.zeros(shape, dtype=self.config.params_dtype, device=self.mean.device)

    def features(self, views: Views) -> torch.Tensor:
        """Features of one or more views: (N, 1 + K, C), the last layer's state first, then the taps' by their layers.

        Args:
            views: Their pixels are uint8, or floats from 0 to 255.
        """
        assert views.grids is not None, "views of any size come with their patches"
        x_NC = self._embed(views)
        angles_N11D = upload(torch.cat([_angles(self.vision, grid) for grid in views.grids]))[:, None, None]
        packs = _frames(views.grids)
        kept, x_N1C = [], x_NC[:, None]
        for index, layer in enumerate(self.decoder.layers):
            x_N1C, _ = layer(
                hidden_states=x_N1C, attention_mask=None, rotary_pos_emb=angles_N11D, packed_seq_params=packs
            )
            if index in self.taps:
                kept.append(x_N1C)
        return torch.cat([x_N1C, *kept], dim=1)

    def _embed(self, views: Views) -> torch.Tensor:
        """(N, C): embedded patches with their positions."""
        assert views.grids is not None
        vision, dtype = self.vision, self.config.params_dtype
        sizes = [grid.num_values(vision.patch_size, vision.temporal_patch_size) for grid in views.grids]
        pixels = views.pixels.to(self.mean.device, non_blocking=True)
        patches = torch.cat(
            [self._patches(part, grid) for part, grid in zip(pixels.split(sizes), views.grids, strict=True)]
        )
        embedded = self.patch_embedding(patches.to(dtype))
        side = int(self.position_embedding.shape[0] ** 0.5)
        tables = [_interpolation(side, vision.merge_size, grid) for grid in views.grids]
        index_N4 = upload(torch.cat([index for index, _ in tables]))
        weight_N4 = upload(torch.cat([weight for _, weight in tables])).to(dtype)
        corners_N4C = self.position_embedding.index_select(0, index_N4.reshape(-1)).view(*index_N4.shape, -1)
        return embedded + (corners_N4C * weight_N4[..., None]).sum(1)

    def _patches(self, pixels: torch.Tensor, grid: ViewGrid) -> torch.Tensor:
        """Normalised patches of one view, (patches of the view, 3 * T * P * P)."""
        p, m, t = self.vision.patch_size, self.vision.merge_size, self.vision.temporal_patch_size
        high, wide = grid.height * p, grid.width * p
        pictures = pixels.view(-1, high, wide, 3).permute(0, 3, 1, 2).float()
        pictures = (pictures - self.mean) / self.std
        if not grid.moving:
            pictures = pictures.repeat_interleave(t, dim=0)
        cut = pictures.view(grid.frames, t, 3, grid.height // m, m, p, grid.width // m, m, p)
        return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(grid.num_patches, -1)


def _frames(grids: Sequence[ViewGrid]) -> Packs:
    """Where each frame of each view ends in the sequence of all patches."""
    ends = tuple(accumulate(grid.height * grid.width for grid in grids for _ in range(grid.frames)))
    return Packs.of(ends, upload(torch.tensor((0, *ends), dtype=torch.int32))).as_one_row()


@lru_cache(maxsize=256)
def _places(merge_size: int, grid: ViewGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Line and column of each patch of one frame, in the order of patches; int64."""
    line, column = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
    blocks = (grid.height // merge_size, merge_size, grid.width // merge_size, merge_size)
    lines, columns = (x.reshape(blocks).permute(0, 2, 1, 3).reshape(-1) for x in (line, column))
    return lines, columns


@lru_cache(maxsize=256)
def _angles(vision: VisionConfig, grid: ViewGrid) -> torch.Tensor:
    """(patches, D) float32: a quarter of a head turns by line and a quarter by column, the other half too."""
    half = vision.hidden_size // vision.num_heads // 2
    inv_freq = 1.0 / (vision.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half))
    line, column = (x[:, None].float() * inv_freq for x in _places(vision.merge_size, grid))
    return torch.cat([line, column, line, column], dim=1).repeat(grid.frames, 1)


@lru_cache(maxsize=256)
def _interpolation(side: int, merge_size: int, grid: ViewGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Which four entries of the square table surround each patch, and their bilinear weights.

    The corners of the view lie on the corners of the table. Returns int64 and float32, both (patches, 4).
    """
    below, above, share = [], [], []
    for places, size in zip(_places(merge_size, grid), (grid.height, grid.width), strict=True):
        exact = places.float() * (side - 1) / max(size - 1, 1)
        floor = exact.floor()
        below.append(floor.long())
        above.append((floor.long() + 1).clamp(max=side - 1))
        share.append(exact - floor)
    index = torch.stack([y * side + x for y in (below[0], above[0]) for x in (below[1], above[1])], dim=1)
    weight = torch.stack([y * x for y in (1 - share[0], share[0]) for x in (1 - share[1], share[1])], dim=1)
    return index.repeat(grid.frames, 1), weight.repeat(grid.frames, 1)


class Merger(torch.nn.Module):
    """LayerNorm, then two linears with a GELU between, over blocks of merge_size x merge_size patches."""

    def __init__(self, vision: VisionConfig, hidden: int, dtype: torch.dtype, *, norm_width: int) -> None:
        """`norm_width` is the tower's width, or the width of a block: the norm is then over the block as a whole."""
        super().__init__()
        block = vision.hidden_size * vision.merge_size**2
        self.norm = torch.nn.LayerNorm(norm_width, eps=vision.layernorm_epsilon, dtype=dtype)
        self.fc1 = torch.nn.Linear(block, block, dtype=dtype)
        self.fc2 = torch.nn.Linear(block, hidden, dtype=dtype)
        self.norm_width, self.block_width = norm_width, block

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        """(N, C) to (N / merge_size ** 2, hidden)."""
        x = self.norm(x_NC.reshape(-1, self.norm_width)).view(-1, self.block_width)
        return self.fc2(torch.nn.functional.gelu(self.fc1(x)))


class Mergers(torch.nn.Module):
    """The projector of a tower for views of any size: a merger for the base rows, and one for each tap."""

    def __init__(self, vision: VisionConfig, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = Merger(vision, hidden, dtype, norm_width=vision.hidden_size)
        block = vision.hidden_size * vision.merge_size**2
        self.taps = torch.nn.ModuleList(Merger(vision, hidden, dtype, norm_width=block) for _ in vision.taps)
        self.order = tuple(vision.taps.index(layer) for layer in sorted(vision.taps))
        """The merger of each tap; taps come by their layers, mergers as the recipe lists them."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, 1 + K, C) to rows (N / merge_size ** 2, 1 + K, hidden): each token's base row, then its stacks'."""
        rows = [self.base(features[:, 0])]
        rows += [self.taps[merger](features[:, 1 + tap]) for tap, merger in enumerate(self.order)]
        return torch.stack(rows, dim=1)
