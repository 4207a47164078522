"""Random initialisation that no layout can change.

Each published tensor is drawn in blocks from generators seeded by (seed, its name, the block's place). A rank draws the
blocks that its part of the tensor touches and no others, with all cores that it may use, and one rank and any tp, pp or
vpp start from the same numbers. Matrices and embeddings are normal with one deviation, those that write to the residual
stream smaller by the square root of twice the depth; norms are 1, biases 0. Of an adapter (LoRA), A is uniform within
1 / sqrt(inputs), as its authors' program draws it, and B zero.
"""

from __future__ import annotations

import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Protocol

import torch

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.model.rules import PartialSource, Shape, Span
from megatron_deepstack.model.weights import VISION_PREFIX
from megatron_deepstack.platform.processes.cores import cores_of_rank

_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight", "attn.proj.weight")
_ADAPTER_INPUTS, _ADAPTER_OUTPUTS = "lora_A.weight", "lora_B.weight"
_BLOCK = (512, 1024)
"""Rows and columns of a block. Ranks share matrices by rows more often than by columns, and 512 rows of a width of 4096
are the part of one of eight ranks, so little is drawn that a rank does not keep."""


def random_source(model: ModelConfig, seed: int, deviation: float = 0.02) -> PartialSource:
    """Initial values that no layout can change.

    Args:
        model: The recipe's model, whose depths scale what writes to the residual stream.
        seed: The run's seed.
        deviation: Standard deviation of matrices and embeddings.

    Returns:
        A function of published name and shape to the full tensor, float32 on the CPU, which can also draw a part alone.
    """
    return _RandomSource(model, seed, deviation)


class _Draw(Protocol):
    """Draws a matrix."""

    def __call__(self, rows: int, columns: int, /, *, generator: torch.Generator) -> torch.Tensor: ...


class _RandomSource(PartialSource):
    def __init__(self, model: ModelConfig, seed: int, deviation: float) -> None:
        self._model, self._seed, self._deviation = model, seed, deviation

    def __call__(self, name: str, shape: Shape) -> torch.Tensor:
        return self.part(name, shape, Span(0, 0, shape[0]))

    def part(self, name: str, shape: Shape, span: Span) -> torch.Tensor:
        own = (*shape[: span.dim], span.stop - span.start, *shape[span.dim + 1 :])
        if name.endswith((".bias", _ADAPTER_OUTPUTS)):
            return torch.zeros(own)
        if "norm" in name.rsplit(".", 2)[-2].lower():
            return torch.ones(own)
        if name.endswith(_ADAPTER_INPUTS):
            return self._drawn(name, shape, span, _uniform).div_(math.sqrt(shape[1])).view(own)
        vision = name.startswith(VISION_PREFIX)
        depth = self._model.vision.num_layers if vision else self._model.language.num_layers
        residual = name.endswith(_RESIDUAL_OUTPUTS)
        scale = self._deviation / math.sqrt(2 * depth) if residual else self._deviation
        return self._drawn(name, shape, span, torch.randn).mul_(scale).view(own)

    def _drawn(self, name: str, shape: Shape, span: Span, draw: _Draw) -> torch.Tensor:
        """The part of the tensor as a matrix, whose columns are all dimensions but the first together.

        Blocks are drawn in threads; torch releases Python's lock while it draws.
        """
        sizes = (shape[0], math.prod(shape[1:]))
        assert span.dim == 0 or len(shape) == 2, f"{name}: a tensor of {len(shape)} dimensions is split by rows alone"
        wanted = [(0, sizes[0]), (0, sizes[1])]
        wanted[span.dim] = (span.start, span.stop)
        part = torch.empty([stop - start for start, stop in wanted])

        def fill(place: tuple[int, ...]) -> None:
            block = self._block(name, place, sizes, draw)
            overlaps = [_overlap(*each) for each in zip(place, _BLOCK, wanted, strict=True)]
            part[tuple(there for there, _ in overlaps)] = block[tuple(here for _, here in overlaps)]

        spans = zip(wanted, _BLOCK, strict=True)
        places = list(product(*(range(start // size, -(-stop // size)) for (start, stop), size in spans)))
        threads = min(cores_of_rank(), len(places))
        if threads <= 1:
            for place in places:
                fill(place)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, places))
        return part

    def _block(self, name: str, place: tuple[int, ...], sizes: tuple[int, int], draw: _Draw) -> torch.Tensor:
        """Draw the block of a place in the grid of blocks; those at the lower and right edge may be smaller.

        torch's CPU generator takes 32 bits of a seed, silently. Of some ten thousand blocks two may be equal by chance.
        """
        label = f"{self._seed}/{name}" + (f"/{place[0]}/{place[1]}" if any(place) else "")
        generator = torch.Generator().manual_seed(zlib.crc32(label.encode()))
        rows, columns = (min(b, size - p * b) for p, b, size in zip(place, _BLOCK, sizes, strict=True))
        return draw(rows, columns, generator=generator)


def _overlap(number: int, size: int, wanted: tuple[int, int]) -> tuple[slice, slice]:
    """Where, along one dimension, a block lies in the part, and where the part lies in that block."""
    first = number * size
    start, stop = max(first, wanted[0]), min(first + size, wanted[1])
    return slice(start - wanted[0], stop - wanted[0]), slice(start - first, stop - first)


def _uniform(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return 2 * torch.rand(rows, columns, generator=generator) - 1
