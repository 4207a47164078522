"""`check-reference --through-export`: a case keeps its tensors and logits in both layouts, and a fault is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_deepstack.config.choices import GridRule, Sampler, Variant
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, StackConfig, VisionConfig
from megatron_deepstack.errors import DataError
from megatron_deepstack.model.published_shapes import published_shapes
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_deepstack.testing.oracle import OracleSample, oracle_forward
from megatron_deepstack.testing.oracle.stacks import num_views_of_image
from megatron_deepstack.testing.published.reference_case import ReferenceCase
from megatron_deepstack.testing.published.through_export import through_export

pytestmark = pytest.mark.usefixtures("quiet_transformers")

VISION = VisionConfig(image_size=16, patch_size=4, hidden_size=24, ffn_hidden_size=48, num_layers=5, num_heads=2)
LANGUAGE = LanguageConfig(vocab_size=61, hidden_size=32, ffn_hidden_size=48, num_layers=6, num_heads=4)
MODEL = ModelConfig(vision=VISION, language=LANGUAGE)
MODELS = {
    "l": replace(MODEL, stacks=StackConfig(start=0, interval=0)),
    "v": replace(MODEL, variant=Variant.DEEPSTACK_V, stacks=StackConfig(grid=GridRule.FIXED_2X2, start=1)),
    "hd": replace(MODEL, variant=Variant.DEEPSTACK_HD, stacks=StackConfig(sampler=Sampler.GRID)),
}


def case_of(name: str) -> ReferenceCase:
    model, generator = MODELS[name], torch.Generator().manual_seed(2)
    shapes = published_shapes(model)
    weights = {key: 0.15 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    tokens = torch.tensor([5, 9, IMAGE_TOKEN_ID, 17, 30, 2])
    views = num_views_of_image(model.variant, (2, 2))
    sample = OracleSample(
        tokens=tokens,
        labels=torch.where(tokens == IMAGE_TOKEN_ID, IGNORE_INDEX, tokens),
        pixel_values=torch.randn(views, 3, 16, 16, generator=generator),
        grids=((2, 2),),
    )
    text = OracleSample(tokens=tokens[3:], labels=tokens[3:])
    logits = oracle_forward(model, weights, [sample, text])
    return ReferenceCase(
        name=name,
        model=model,
        weights=weights,
        grads={},
        samples=(sample, text),
        logits=tuple(logits),
        loss=0.0,
        attention_mask=torch.ones(2, 6, dtype=torch.int64),
        max_tokens=None,
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_case_comes_back_as_it_was(name: str) -> None:
    case = case_of(name)
    back, result = through_export(case)
    assert result.passed, result
    assert str(result).startswith(f"ok   {name}, exported: logits by transformers ")
    assert all(torch.equal(back.weights[key], value) for key, value in case.weights.items())
    (again, _) = oracle_forward(back.model, back.weights, case.samples)
    assert torch.equal(again, case.logits[0])


def test_other_logits_are_a_failure() -> None:
    case = case_of("l")
    wrong = replace(case, logits=(case.logits[0] + 1e-3, case.logits[1]))
    _, result = through_export(wrong)
    assert not result.passed
    assert str(result).startswith("FAIL l, exported: logits by transformers 1.0e-03 absolute, 0 tensors changed")
    with pytest.raises(DataError, match=r"holds no weight.model.norm.weight"):
        through_export(replace(case, weights={k: v for k, v in case.weights.items() if k != "model.norm.weight"}))
