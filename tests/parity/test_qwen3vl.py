"""`Qwen3VLTextModel`, driven with its own embeddings and stacks, as an independent oracle of the injection.

It adds visual embedding i to the output of layer i at the positions of a mask: our slot i + 1. Nothing of it knows of
crops, mosaics or pipelines, so the stacks are plain random rows here, with a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hf_models import CLIP, published_gradients, published_weights, randomise
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, ParallelConfig, StackConfig
from megatron_deepstack.testing.compare import gather_published, relative_error, worst
from megatron_deepstack.testing.ranks import RankPool, groups_for

pytestmark = pytest.mark.usefixtures("quiet_transformers")

LANGUAGE = LanguageConfig(
    vocab_size=61,
    hidden_size=32,
    ffn_hidden_size=48,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_epsilon=1e-6,
    qk_norm=True,
)
NUM_STACKS = 4
# Measured: hidden states 7.5e-7, gradients of stacks 5.7e-7 and parameters 2.0e-6 (float64 against our float32). One
# layer off: 1.1 (start 0) and 0.66 (start 2).
TOLERANCE = 1e-5

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Injection:
    """Batch-first input: embeddings (B, S, H), mask (B, S), stacks (K, V, H) of the V marked positions in order."""

    embeddings: torch.Tensor
    mask: torch.Tensor
    stacks: torch.Tensor
    cotangent: torch.Tensor
    """(B, S, H), multiplied with the final hidden states."""


@dataclass(frozen=True, slots=True)
class Result:
    """Final hidden states, and gradients of embeddings, stacks and parameters."""

    hidden: torch.Tensor
    embeddings: torch.Tensor
    stacks: torch.Tensor
    parameters: Tensors


def draw_injection() -> Injection:
    """Two sequences with different visual positions, one of them in two stretches."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 2:6], mask[1, 0:2], mask[1, 7:9] = True, True, True
    shape = (2, 10, LANGUAGE.hidden_size)
    stacks = torch.randn(NUM_STACKS, int(mask.sum()), LANGUAGE.hidden_size, generator=generator)
    embeddings, cotangent = (torch.randn(shape, generator=generator) for _ in range(2))
    return Injection(embeddings=embeddings, mask=mask, stacks=stacks, cotangent=cotangent)


def transformers_result(given: Injection) -> tuple[Result, Tensors]:
    """The oracle's result, and its weights under published names."""
    config = Qwen3VLTextConfig(
        vocab_size=LANGUAGE.vocab_size,
        hidden_size=LANGUAGE.hidden_size,
        intermediate_size=LANGUAGE.ffn_hidden_size,
        num_hidden_layers=LANGUAGE.num_layers,
        num_attention_heads=LANGUAGE.num_heads,
        num_key_value_heads=LANGUAGE.num_kv_heads,
        head_dim=LANGUAGE.head_dim,
        rms_norm_eps=LANGUAGE.norm_epsilon,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": LANGUAGE.rope_theta,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
        attn_implementation="eager",
    )
    module = Qwen3VLTextModel(config)
    randomise(module)
    embeddings = given.embeddings.double().requires_grad_()
    stacks = given.stacks.double().requires_grad_()
    batch, length = given.mask.shape
    hidden = module(
        inputs_embeds=embeddings,
        position_ids=torch.arange(length).expand(batch, length),
        visual_pos_masks=given.mask,
        deepstack_visual_embeds=list(stacks),
        use_cache=False,
    ).last_hidden_state
    hidden.backward(given.cotangent.double())
    assert embeddings.grad is not None
    assert stacks.grad is not None
    result = Result(
        hidden=hidden.detach().float(),
        embeddings=embeddings.grad.float(),
        stacks=stacks.grad.float(),
        parameters=published_gradients(module),
    )
    return result, published_weights(module)


def our_result(rank: int, start: int, weights: Tensors, given: Injection) -> Result:
    """Ours on one rank, the stacks at slots start, start + 1, ...; embeddings enter as base rows at every position."""
    from megatron_deepstack.model.build import build_model, fill_model
    from megatron_deepstack.model.language import VisualInputs

    model = ModelConfig(vision=CLIP, language=LANGUAGE, stacks=StackConfig(num_crops=NUM_STACKS, start=start))
    groups = groups_for(ParallelConfig())
    built = build_model(model, ParallelConfig(), Precision.FP32, groups)
    fill_model(built, lambda name, shape: weights.get(name, torch.zeros(shape)), groups.decoder.tp)
    (chunk,) = built.chunks
    final: list[torch.Tensor] = []
    chunk.decoder.register_forward_hook(lambda module, inputs, output: final.append(output))
    batch, length = given.mask.shape
    everywhere = (torch.arange(length)[None] * batch + torch.arange(batch)[:, None]).expand(batch, length)
    embeddings = given.embeddings.clone().requires_grad_()
    stacks = given.stacks.clone().requires_grad_()
    chunk(
        torch.zeros(batch, length, dtype=torch.int64),
        None,
        VisualInputs(
            base_rows=embeddings.flatten(0, 1),
            base_positions=everywhere.flatten(),
            slot_rows=stacks,
            slot_positions=everywhere[given.mask].expand(NUM_STACKS, -1),
        ),
    )
    (hidden_SBH,) = final
    hidden_SBH.backward(given.cotangent.transpose(0, 1))
    assert embeddings.grad is not None
    assert stacks.grad is not None
    return Result(
        hidden=hidden_SBH.detach().transpose(0, 1).contiguous(),
        embeddings=embeddings.grad,
        stacks=stacks.grad,
        parameters=gather_published(built, groups, lambda parameter: parameter.grad),
    )


@pytest.fixture(scope="module")
def given() -> Injection:
    """The input of all tests here."""
    return draw_injection()


@pytest.fixture(scope="module")
def oracle(given: Injection) -> tuple[Result, Tensors]:
    """What transformers makes of it."""
    return transformers_result(given)


def test_injection_equals_qwen3_vl(
    ranks: Callable[[int], RankPool], given: Injection, oracle: tuple[Result, Tensors]
) -> None:
    """Its stacks after layers 0 to 3 are ours before layers 1 to 4, gradients of the stacks included."""
    expected, weights = oracle
    ours = ranks(1).run(our_result, 1, weights, given)[0]
    errors = {
        "hidden states": relative_error(ours.hidden, expected.hidden),
        "embeddings": relative_error(ours.embeddings, expected.embeddings),
        "stacks": relative_error(ours.stacks, expected.stacks),
    }
    covered = {"model.embed_tokens.weight": torch.zeros_like(weights["model.embed_tokens.weight"])}
    errors["parameters"], where = worst(ours.parameters, {**expected.parameters, **covered})
    assert max(errors.values()) <= TOLERANCE, (errors, where)


@pytest.mark.parametrize("start", [0, 2])
def test_another_slot_is_another_model(
    ranks: Callable[[int], RankPool], given: Injection, oracle: tuple[Result, Tensors], start: int
) -> None:
    """The comparison tells layers apart: one layer earlier or later is off by far more than any rounding."""
    expected, weights = oracle
    ours = ranks(1).run(our_result, start, weights, given)[0]
    error = relative_error(ours.hidden, expected.hidden)
    assert error > 1000 * TOLERANCE
