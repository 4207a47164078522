"""DeepStack on a SigLIP tower and a Qwen2-type decoder, which nobody published: ours against the oracle in plain torch.

The oracle's tower and decoder equal the published numbers, its stacks too; SigLIP's embedding in it is checked here
against transformers by the same features as ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hf_models import SIGLIP, hf_tower, published_weights, randomise
from test_decoders import GROUPED, hf_decoder
from transformers import AutoModelForCausalLM, Qwen2Config, SiglipVisionModel

from megatron_deepstack.config.choices import GridRule, Variant
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, StackConfig
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_deepstack.planning.views import Grid, num_views
from megatron_deepstack.testing.oracle import OracleSample, oracle_forward, oracle_loss
from megatron_deepstack.testing.oracle.vision import encode_views
from megatron_deepstack.testing.published.reference import check_case
from megatron_deepstack.testing.published.reference_case import ReferenceCase
from megatron_deepstack.testing.ranks import RankPool

pytestmark = pytest.mark.usefixtures("quiet_transformers")

LANGUAGE = replace(GROUPED, qkv_bias=True, num_layers=5)
MODELS = {
    Variant.DEEPSTACK_L: (StackConfig(start=0), ((2, 2), (3, 1))),
    Variant.DEEPSTACK_V: (StackConfig(grid=GridRule.FIXED_2X2, start=1), ((2, 2), (2, 2))),
    Variant.DEEPSTACK_HD: (StackConfig(start=1), ((2, 1), (1, 2))),
}
# Measured worst: logits 2.7e-6, loss 6.6e-8, gradients 3.4e-6 (float64 oracle, float32 ours).
Tensors = dict[str, torch.Tensor]


def draw_weights(model: ModelConfig) -> Tensors:
    """Tower and decoder from transformers, projector and newline beside them."""
    tower, decoder = (
        SiglipVisionModel(hf_tower(SIGLIP)),
        AutoModelForCausalLM.from_config(hf_decoder(Qwen2Config, LANGUAGE)),
    )
    randomise(tower)
    randomise(decoder)
    generator = torch.Generator().manual_seed(4)
    width, hidden = SIGLIP.hidden_size, LANGUAGE.hidden_size
    shapes = {
        "model.mm_projector.0.weight": (hidden, width),
        "model.mm_projector.0.bias": (hidden,),
        "model.mm_projector.2.weight": (hidden, hidden),
        "model.mm_projector.2.bias": (hidden,),
        "model.image_newline": (hidden,),
    }
    others = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    return {**published_weights(tower), **published_weights(decoder), **others}


def draw_sample(model: ModelConfig, grid: Grid, generator: torch.Generator) -> OracleSample:
    tokens = torch.randint(1, LANGUAGE.vocab_size, (10,), generator=generator)
    tokens[3] = IMAGE_TOKEN_ID
    labels = torch.where(torch.arange(10) > 4, tokens, IGNORE_INDEX)
    size = SIGLIP.image_size
    pixels = torch.randn(num_views(model.variant, grid), 3, size, size, generator=generator)
    return OracleSample(tokens=tokens, labels=labels, pixel_values=pixels, grids=(grid,))


def oracle_case(model: ModelConfig, grids: tuple[Grid, ...]) -> ReferenceCase:
    """One sample per grid through the oracle in float64."""
    generator = torch.Generator().manual_seed(6)
    samples = tuple(draw_sample(model, grid, generator) for grid in grids)
    weights = draw_weights(model)
    exact = {name: value.double().requires_grad_() for name, value in weights.items()}
    logits = oracle_forward(model, exact, samples)
    loss = oracle_loss(model, logits, samples)
    loss.backward()
    return ReferenceCase(
        name=f"siglip-{model.variant}",
        model=model,
        weights=weights,
        grads={name: value.grad.float() for name, value in exact.items() if value.grad is not None},
        samples=samples,
        logits=tuple(rows.detach().float() for rows in logits),
        loss=loss.item(),
        attention_mask=torch.empty(0),
        max_tokens=None,
    )


@pytest.mark.parametrize("variant", MODELS)
def test_stacks_on_siglip(ranks: Callable[[int], RankPool], variant: Variant) -> None:
    stacks, grids = MODELS[variant]
    model = ModelConfig(variant=variant, vision=SIGLIP, language=LANGUAGE, stacks=stacks)
    result = check_case(ranks(1), oracle_case(model, grids), ParallelConfig())
    assert result.passed, str(result)


def test_the_oracles_siglip_is_transformers() -> None:
    """Features of the same weights in float64; measured 2.0e-15 apart."""
    tower = SiglipVisionModel(hf_tower(SIGLIP))
    randomise(tower)
    weights = {name: value.double() for name, value in published_weights(tower).items()}
    pixels = torch.randn(
        2, 3, SIGLIP.image_size, SIGLIP.image_size, generator=torch.Generator().manual_seed(2)
    ).double()
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states[SIGLIP.select_layer]
    error = (encode_views(SIGLIP, weights, pixels) - expected).abs().max()
    assert error < 1e-12
