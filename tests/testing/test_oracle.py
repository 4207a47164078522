"""The oracle against the published implementation's numbers, and its own rules where no numbers were published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_deepstack.config.choices import Sampler, Variant
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, StackConfig, VisionConfig
from megatron_deepstack.testing.oracle import OracleSample, oracle_forward, oracle_loss
from megatron_deepstack.testing.oracle.stacks import mosaic, sample_stacks
from megatron_deepstack.testing.published.reference_case import load_case

CASES = ("l_square", "l_start0_interval2", "l_mixed_grids", "l_text_only_sample", "v_layer2", "hd_anyres")

# Worst of the six cases, float32 on torch 2.13 CPU: logits 6.1e-6 absolute (entries up to 5), loss 9.5e-7,
# gradients 4.9e-6 of their tensor's largest entry. A key bias of the ViT shifts all scores of a query alike, so its
# true gradient is zero and both sides hold rounding noise: at most 2.5e-8 there, 1.5e-8 here.
LOGITS_ATOL, LOSS_ATOL, GRAD_RTOL, NOISE_ATOL = 1.2e-5, 2e-6, 1.5e-5, 1e-7


@pytest.mark.parametrize("name", CASES)
def test_oracle_equals_published_numbers(reference: Path, name: str) -> None:
    case = load_case(reference / "deepstack" / name)
    weights = {name: weight.clone().requires_grad_() for name, weight in case.weights.items()}
    logits = oracle_forward(case.model, weights, case.samples, max_tokens=case.max_tokens)
    loss = oracle_loss(case.model, logits, case.samples, max_tokens=case.max_tokens)
    loss.backward()

    for ours, published in zip(logits, case.logits, strict=True):
        torch.testing.assert_close(ours, published, rtol=0, atol=LOGITS_ATOL)
    assert abs(loss.item() - case.loss) <= LOSS_ATOL
    assert {name for name, weight in weights.items() if weight.grad is not None} == set(case.grads)
    for name, published in case.grads.items():
        tolerance = max(NOISE_ATOL, GRAD_RTOL * published.abs().max().item())
        worst = (weights[name].grad - published).abs().max().item()
        assert worst <= tolerance, f"{name}: gradient off by {worst:.2e}, allowed {tolerance:.2e}"


MODEL = ModelConfig(
    variant=Variant.DEEPSTACK_L,
    vision=VisionConfig(
        image_size=8, patch_size=4, hidden_size=8, ffn_hidden_size=16, num_layers=4, num_heads=2, select_layer=-2
    ),
    language=LanguageConfig(
        vocab_size=11,
        hidden_size=16,
        ffn_hidden_size=24,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        qkv_bias=True,
        qk_norm=True,
        tied_embeddings=True,
    ),
    stacks=StackConfig(num_crops=4, start=0, interval=1),
)


def random_weights(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random float64 weights under published names, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    vision, language = model.vision, model.language
    tower = "model.vision_tower.vision_tower.vision_model."
    wide, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    head = language.hidden_size // language.num_heads
    kv = head * (language.num_kv_heads or language.num_heads)
    shapes: dict[str, tuple[int, ...]] = {
        tower + "embeddings.patch_embedding.weight": (wide, 3, vision.patch_size, vision.patch_size),
        tower + "embeddings.class_embedding": (wide,),
        tower + "embeddings.position_embedding.weight": (patches + 1, wide),
        tower + "pre_layrnorm.weight": (wide,),
        tower + "pre_layrnorm.bias": (wide,),
        "model.mm_projector.0.weight": (language.hidden_size, wide),
        "model.mm_projector.0.bias": (language.hidden_size,),
        "model.mm_projector.2.weight": (language.hidden_size, language.hidden_size),
        "model.mm_projector.2.bias": (language.hidden_size,),
        "model.image_newline": (language.hidden_size,),
        "model.embed_tokens.weight": (language.vocab_size, language.hidden_size),
        "model.norm.weight": (language.hidden_size,),
    }
    for layer in range(vision.num_layers):
        name = f"{tower}encoder.layers.{layer}."
        for linear in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{name}self_attn.{linear}.weight": (wide, wide), f"{name}self_attn.{linear}.bias": (wide,)}
        shapes |= {name + "mlp.fc1.weight": (vision.ffn_hidden_size, wide), name + "mlp.fc1.bias": (16,)}
        shapes |= {name + "mlp.fc2.weight": (wide, vision.ffn_hidden_size), name + "mlp.fc2.bias": (wide,)}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{name}{norm}.weight": (wide,), f"{name}{norm}.bias": (wide,)}
    for layer in range(language.num_layers):
        name = f"model.layers.{layer}."
        for projection, width in (("q", language.hidden_size), ("k", kv), ("v", kv)):
            shapes[f"{name}self_attn.{projection}_proj.weight"] = (width, language.hidden_size)
            shapes[f"{name}self_attn.{projection}_proj.bias"] = (width,)
        shapes |= {f"{name}self_attn.{norm}.weight": (head,) for norm in ("q_norm", "k_norm")}
        shapes[name + "self_attn.o_proj.weight"] = (language.hidden_size, language.hidden_size)
        for linear in ("gate_proj", "up_proj"):
            shapes[f"{name}mlp.{linear}.weight"] = (language.ffn_hidden_size, language.hidden_size)
        shapes[name + "mlp.down_proj.weight"] = (language.hidden_size, language.ffn_hidden_size)
        shapes |= {f"{name}{norm}.weight": (16,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return {k: 0.3 * torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}


def make_sample(tokens: list[int], grids: tuple[tuple[int, int], ...] = (), views: int = 0) -> OracleSample:
    generator = torch.Generator().manual_seed(len(tokens))
    pixels = torch.randn(views, 3, 8, 8, generator=generator) if views else None
    ids = torch.tensor(tokens)
    return OracleSample(tokens=ids, labels=ids.where(ids >= 0, -100), pixel_values=pixels, grids=grids)


@pytest.mark.parametrize("sampler", list(Sampler))
@pytest.mark.parametrize("grid", [(2, 2), (1, 2), (3, 1)])
def test_stacks_hold_every_mosaic_token_once(sampler: Sampler, grid: tuple[int, int]) -> None:
    crops = torch.arange(grid[0] * grid[1] * 4 * 5).reshape(-1, 4, 5)
    stacked = torch.stack(sample_stacks(crops, grid, sampler))
    assert stacked.shape == crops.shape
    assert sorted(stacked.flatten().tolist()) == crops.flatten().tolist()


def test_dilated_token_lies_on_its_global_cell() -> None:
    """Row-major cell (r, c) of stack i*gw+j holds mosaic token (r*gh+i, c*gw+j)."""
    gw, gh, side = 3, 2, 4
    crops = torch.arange(gw * gh * side * side).reshape(gw * gh, side * side, 1)
    picture = mosaic(crops, (gw, gh))
    assert picture[side, 2 * side].item() == crops[1 * gw + 2, 0].item(), "crops lie in raster order"
    for k, stack in enumerate(sample_stacks(crops, (gw, gh), Sampler.DILATED_2D)):
        i, j = divmod(k, gw)
        for cell in range(side * side):
            r, c = divmod(cell, side)
            assert stack[cell] == picture[r * gh + i, c * gw + j]


def test_two_images_anywhere_in_the_text() -> None:
    """Both images reach the logits after them, and only those; the first ends the text of a causal model."""
    weights = random_weights(MODEL)
    sample = make_sample([1, -200, 2, 3, -200, 4], ((2, 2), (1, 2)), views=5 + 3)
    (before,) = oracle_forward(MODEL, weights, [sample])
    assert before.shape == (4 + 2 * 4, 11)
    assert sample.pixel_values is not None
    changed = sample.pixel_values.clone()
    changed[-1] += 1.0  # the last crop of the second image
    (after,) = oracle_forward(MODEL, weights, [replace(sample, pixel_values=changed)])
    second_image = 1 + 4 + 2
    assert torch.equal(before[:second_image], after[:second_image])
    assert not torch.allclose(before[-1], after[-1])


def test_text_only_sample_needs_no_image() -> None:
    weights = {name: w.requires_grad_() for name, w in random_weights(MODEL).items()}
    samples = [make_sample([5, 6, 7]), make_sample([5, -200, 7], ((2, 1),), views=3)]
    logits = oracle_forward(MODEL, weights, samples)
    assert [len(rows) for rows in logits] == [3, 6]
    text_loss = oracle_loss(MODEL, logits[:1], samples[:1])
    both = oracle_loss(MODEL, logits, samples)
    assert both.item() != pytest.approx(text_loss.item())
    text_loss.backward(retain_graph=True)
    assert weights["model.mm_projector.0.weight"].grad is None
    both.backward()
    assert weights["model.mm_projector.0.weight"].grad is not None


@pytest.mark.parametrize(
    ("variant", "views", "rows"),
    [
        pytest.param(Variant.LLAVA, 1, 4, id="llava"),
        pytest.param(Variant.LLAVA_ANYRES, 3, 4 + 2 * (4 + 1), id="llava_anyres"),
        pytest.param(Variant.IN_SEQUENCE, 3, 4 * 3, id="in_sequence"),
        pytest.param(Variant.DEEPSTACK_L, 3, 4, id="deepstack_l"),
        pytest.param(Variant.DEEPSTACK_V, 3, 4, id="deepstack_v"),
        pytest.param(Variant.DEEPSTACK_HD, 15, 4 + 2 * (4 + 1), id="deepstack_hd"),
    ],
)
def test_variants_use_every_view(variant: Variant, views: int, rows: int) -> None:
    model = replace(MODEL, variant=variant)
    weights = random_weights(model)
    sample = make_sample([1, -200, 2], ((2, 1),), views=views)
    assert sample.pixel_values is not None
    pixels = sample.pixel_values.double().requires_grad_()
    (logits,) = oracle_forward(model, weights, [replace(sample, pixel_values=pixels)])
    assert len(logits) == 2 + rows
    oracle_loss(model, [logits], [sample]).backward()
    assert pixels.grad is not None
    assert (pixels.grad.abs().sum(dim=(1, 2, 3)) > 0).all()


def test_cut_sample_is_a_prefix() -> None:
    """Cutting inside an image keeps the rows before the cut as they were."""
    weights = random_weights(MODEL)
    sample = make_sample([1, -200, 2, 3], ((2, 2),), views=5)
    (whole,) = oracle_forward(MODEL, weights, [sample])
    (cut,) = oracle_forward(MODEL, weights, [sample], max_tokens=3)
    torch.testing.assert_close(cut, whole[:3], rtol=0, atol=1e-12)


def test_two_stacks_in_one_slot_add_up() -> None:
    weights = random_weights(MODEL)
    same = replace(MODEL, stacks=StackConfig(num_crops=2, slots=(1, 1)))
    apart = replace(MODEL, stacks=StackConfig(num_crops=2, slots=(1, 2)))
    sample = make_sample([1, -200, 2], ((2, 1),), views=3)
    (together,), (separate,) = oracle_forward(same, weights, [sample]), oracle_forward(apart, weights, [sample])
    assert together.isfinite().all()
    assert not torch.allclose(together, separate)


def test_stack_outside_the_decoder_is_an_error() -> None:
    model = replace(MODEL, stacks=StackConfig(num_crops=4, start=2))
    with pytest.raises(AssertionError, match=r"stacks before layers \[4, 5\], but the decoder has layers 0\.\.3"):
        oracle_forward(model, random_weights(model), [make_sample([1, -200, 2], ((2, 2),), views=5)])
