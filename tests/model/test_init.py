"""Initial weights: a function of seed and name, with the deviations that the recipe asks for."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_deepstack.model.init import random_source
from megatron_deepstack.testing.tiny import tiny_model

QUERY, OUTPUT = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"


def test_seed_and_name_decide() -> None:
    """Each of the two changes the numbers; neither depends on what was drawn before."""
    model, shape = tiny_model(), (32, 32)
    first = random_source(model, 1)(QUERY, shape)
    assert torch.equal(first, random_source(model, 1)(QUERY, shape))
    assert not torch.equal(first, random_source(model, 2)(QUERY, shape))
    assert not torch.equal(first, random_source(model, 1)("model.layers.1.self_attn.q_proj.weight", shape))


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        (QUERY, 0.05),
        (OUTPUT, 0.05 / math.sqrt(16)),
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc2.weight", 0.05 / math.sqrt(6)),
        ("model.embed_tokens.weight", 0.05),
    ],
)
def test_deviations(name: str, deviation: float) -> None:
    """Projections that write to the residual stream are smaller by the square root of twice their tower's depth."""
    drawn = random_source(tiny_model(), 0, 0.05)(name, (400, 400))
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.02)


def test_norms_and_biases() -> None:
    source = random_source(tiny_model(), 0)
    assert torch.equal(source("model.layers.0.input_layernorm.weight", (8,)), torch.ones(8))
    assert torch.equal(source("model.norm.weight", (8,)), torch.ones(8))
    assert torch.equal(source("model.mm_projector.0.bias", (8,)), torch.zeros(8))
