"""Random initialisation that no layout can change.

Each published tensor is drawn whole from a generator seeded by (seed, its name) and then split, so one rank and any
tp, pp or vpp start from the same numbers. Matrices and embeddings are normal with one deviation, those that write to
the residual stream smaller by the square root of twice the depth; norms are 1, biases 0. Of an adapter (LoRA), A is
uniform within 1 / sqrt(inputs), as its authors' program draws it, and B zero.
"""

from __future__ import annotations

import math
import zlib

import torch

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.model.rules import Shape, Source
from megatron_deepstack.model.weights import VISION_PREFIX

_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight", "attn.proj.weight")
_ADAPTER_INPUTS, _ADAPTER_OUTPUTS = "lora_A.weight", "lora_B.weight"


def random_source(model: ModelConfig, seed: int, deviation: float = 0.02) -> Source:
    """Initial values that no layout can change.

    Args:
        model: The recipe's model, whose depths scale what writes to the residual stream.
        seed: The run's seed.
        deviation: Standard deviation of matrices and embeddings.

    Returns:
        A function of published name and shape to the full tensor, float32 on the CPU.
    """

    def draw(name: str, shape: Shape) -> torch.Tensor:
        if name.endswith(".bias"):
            return torch.zeros(shape)
        if "norm" in name.rsplit(".", 2)[-2].lower():
            return torch.ones(shape)
        if name.endswith(_ADAPTER_OUTPUTS):
            return torch.zeros(shape)
        mixed = zlib.crc32(f"{seed}/{name}".encode())  # torch's CPU generator takes 32 bits of a seed, silently
        generator = torch.Generator().manual_seed(mixed)
        if name.endswith(_ADAPTER_INPUTS):
            return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])
        depth = model.vision.num_layers if name.startswith(VISION_PREFIX) else model.language.num_layers
        residual = name.endswith(_RESIDUAL_OUTPUTS)
        scale = deviation / math.sqrt(2 * depth) if residual else deviation
        return torch.randn(shape, generator=generator) * scale

    return draw
