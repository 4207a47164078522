"""Vision towers of transformers against ours: the selected features, and every gradient that reaches them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hf_models import CLIP, SIGLIP, hf_tower, llava_model, published_gradients, published_weights, randomise
from transformers import CLIPVisionModel, SiglipVisionModel

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, ParallelConfig, VisionConfig
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.testing.compare import relative_error, worst
from megatron_deepstack.testing.ranks import RankPool, groups_for

pytestmark = pytest.mark.usefixtures("quiet_transformers")

LANGUAGE = LanguageConfig(vocab_size=61, hidden_size=32, ffn_hidden_size=48, num_layers=2, num_heads=4)

# Measured worst of all towers: features 2.8e-7, gradients 9.4e-6 (float64 transformers, float32 ours).
TOLERANCE = 5e-6
# Key biases, which have no gradient in exact arithmetic, are the worst: rounding against `compare.NOISE_FLOOR`.
GRADIENT_TOLERANCE = 5e-5

TOWERS = [
    ("clip", CLIP),
    ("clip-last", replace(CLIP, select_layer=-1)),
    ("clip-first", replace(CLIP, select_layer=1)),
    ("siglip", SIGLIP),
    ("siglip-last", replace(SIGLIP, select_layer=-1)),
    ("siglip-whole-patches", replace(SIGLIP, image_size=16)),
]

Tensors = dict[str, torch.Tensor]


def encode_on_rank(
    rank: int, model: ModelConfig, weights: Tensors, pixels: torch.Tensor, cotangent: torch.Tensor
) -> tuple[torch.Tensor, Tensors]:
    """Our features (N, P * P, C), and gradients of their product with `cotangent` under published names."""
    from megatron_deepstack.model.rules import fill
    from megatron_deepstack.model.vision.encoder import VisualEncoder
    from megatron_deepstack.model.weights import encoder_rules

    encoder = VisualEncoder(model, Precision.FP32, groups_for(ParallelConfig()).encoder)
    rules = encoder_rules(encoder, model)
    fill(encoder, rules, lambda name, shape: weights.get(name, torch.zeros(shape)), 0, 1)
    features = encoder.vit(pixels)
    features.backward(cotangent)
    gradients: Tensors = {}
    for name, parameter in encoder.vit.named_parameters(prefix="vit"):
        if parameter.grad is not None:
            gradients.update(zip(rules[name].names, rules[name].published([parameter.grad]), strict=True))
    return features.detach(), gradients


@pytest.mark.parametrize(("name", "vision"), TOWERS, ids=[row[0] for row in TOWERS])
def test_tower(ranks: Callable[[int], RankPool], name: str, vision: VisionConfig) -> None:
    """Also where the picture is not a whole number of patches, and where the feature follows the last layer."""
    tower = (CLIPVisionModel if vision.kind == "clip" else SiglipVisionModel)(hf_tower(vision))
    randomise(tower)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, vision.image_size, vision.image_size, generator=generator)
    states = tower(pixels.double(), output_hidden_states=True).hidden_states
    expected = states[vision.select_layer][:, tower_of(vision).num_leading_tokens :]
    cotangent = torch.randn(expected.shape, generator=generator)
    expected.backward(cotangent.double())
    model = llava_model(LANGUAGE, vision)
    features, gradients = ranks(1).run(encode_on_rank, model, published_weights(tower), pixels, cotangent)[0]
    error = relative_error(features, expected.detach().float())
    gradient_error, where = worst(gradients, published_gradients(tower))
    assert error <= TOLERANCE
    assert gradient_error <= GRADIENT_TOLERANCE, where
