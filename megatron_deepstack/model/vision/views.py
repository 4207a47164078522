"""The views of one pass of the encoder: their pixels, and the sizes of those that have any size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_deepstack.config.schema import VisionConfig
from megatron_deepstack.planning.views import ViewGrid


@dataclass(frozen=True, slots=True)
class Views:
    """Views in order."""

    pixels: torch.Tensor
    """uint8 (N, image, image, 3), or normalised float (N, 3, image, image). If views have any size, all values of one
    view after another in one dimension: each picture is (height, width, 3), uint8, or floats from 0 to 255."""
    grids: tuple[ViewGrid, ...] | None = None
    """The patches of each view, if views have any size."""

    def __len__(self) -> int:
        return len(self.pixels) if self.grids is None else len(self.grids)

    @property
    def num_patches(self) -> list[int]:
        """Patches of each view of any size; 1 for each of others, which are all equal."""
        return [1] * len(self) if self.grids is None else [grid.num_patches for grid in self.grids]

    def part(self, first: int, stop: int, vision: VisionConfig) -> Views:
        """The views from number `first` to `stop - 1`, without a copy.

        Args:
            first: Number of the first view.
            stop: One past the number of the last.
            vision: The tower, which says how many values a view of any size has.
        """
        if self.grids is None:
            return Views(self.pixels[first:stop])
        sizes = [grid.num_values(vision.patch_size, vision.temporal_patch_size) for grid in self.grids]
        begin, length = sum(sizes[:first]), sum(sizes[first:stop])
        return Views(self.pixels[begin : begin + length], self.grids[first:stop])
