"""LoRA on the vision tower and the projector: gradients by the chain rule, layouts against one rank, merging, freezing.

The adapters' gradients follow from those of the weights that they stand beside: with W' = W + s B A, the gradient of B
is s dW' A^T, and that of A is s B^T dW'. So a model with the merged weights, of which everything learns, is the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_lora_layouts import GRADIENT_TOLERANCE, LOSS_TOLERANCE, PARAMETER_TOLERANCE, step_gradients, stirred

from megatron_deepstack.config.choices import EncoderPlacement, LoraTarget, Part, Precision
from megatron_deepstack.config.schema import LoraConfig, ModelConfig, ParallelConfig, Recipe
from megatron_deepstack.testing.compare import worst
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_granite, tiny_model, tiny_qwen3_vl, tiny_recipe
from megatron_deepstack.testing.trial import Trial, run_trial

Pools = Callable[[int], RankPool]
Tensors = dict[str, torch.Tensor]
EVERYWHERE = LoraConfig(rank=3, alpha=6.0, vision_targets=tuple(LoraTarget), projector=True)
MODELS: dict[str, Callable[[], ModelConfig]] = {
    "deepstack_l": tiny_model,
    "qwen3_vl": tiny_qwen3_vl,
    "granite4_vision": tiny_granite,
}


def recipe_of(model: str, parallel: ParallelConfig | None = None, lora: LoraConfig = EVERYWHERE) -> Recipe:
    return replace(tiny_recipe(MODELS[model](), parallel, trainable=tuple(Part)), lora=lora)


def full_gradients(rank: int, recipe: Recipe, weights: Tensors) -> tuple[float, Tensors]:
    """Loss and gradients of a model without adapters that has the given weights."""
    import test_lora_layouts

    plain = replace(recipe, lora=LoraConfig())
    drawn = test_lora_layouts.stirred
    test_lora_layouts.stirred = lambda _: lambda name, shape: weights[name]  # type: ignore[assignment]
    try:
        found = step_gradients(0, plain)
    finally:
        test_lora_layouts.stirred = drawn
    assert found is not None
    return found[0], found[1]


def merged_on_rank(rank: int, recipe: Recipe) -> Tensors:
    from megatron_deepstack.model.build import build_model, fill_model, merge_adapters
    from megatron_deepstack.testing.compare import gather_published

    groups = groups_for(recipe.parallel)
    model = build_model(recipe.model, recipe.parallel, Precision.FP32, groups, recipe.lora)
    fill_model(model, stirred(recipe), groups.decoder.tp)
    return gather_published(merge_adapters(model), groups, lambda parameter: parameter)


def by_the_chain_rule(weights: Tensors, full: Tensors, lora: LoraConfig) -> Tensors:
    """The gradients of all adapters from those of the merged weights."""
    scale, found = lora.alpha / lora.rank, {}
    shared = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    shared |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    for name, b in weights.items():
        module = name.removesuffix(".lora_B.weight")
        if module == name or f"{module}.weight" not in full:
            continue  # no adapter, or of a layer that no row passes
        path, _, linear = module.rpartition(".")
        own_a = f"{path}.{shared.get(linear, linear)}.lora_A.weight"
        gradient = full[f"{module}.weight"]
        found[name] = scale * gradient @ weights[own_a].T
        found[own_a] = found.get(own_a, 0) + scale * b.T @ gradient
    return found


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=[pytest.mark.slow] * (name == "granite4_vision")) for name in MODELS]
)
def test_gradients_follow_from_those_of_the_merged_weights(ranks: Pools, model: str) -> None:
    recipe = recipe_of(model)
    loss, gradients, weights = ranks(1).run(step_gradients, recipe)[0]
    merged = ranks(1).run(merged_on_rank, recipe)[0]
    truth, full = ranks(1).run(full_gradients, recipe, merged)[0]
    assert loss == pytest.approx(truth, rel=LOSS_TOLERANCE)
    expected = by_the_chain_rule(weights, full, recipe.lora)
    assert set(gradients) == set(expected)
    parts = {part: [name for name in gradients if part in name] for part in ("vision_tower", "mm_projector", "layers.")}
    assert all(parts.values())
    error, name = worst(gradients, expected)
    assert error <= GRADIENT_TOLERANCE, f"gradient of {name}"


LAYOUTS = [
    ("qwen3_vl", 2, ParallelConfig(pipeline=2)),
    ("granite4_vision", 4, ParallelConfig(pipeline=4)),
    ("granite4_vision", 2, ParallelConfig(tensor=2, sequence_parallel=True)),
    ("qwen3_vl", 4, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)),
    ("qwen3_vl", 2, ParallelConfig(context=2)),
    ("granite4_vision", 2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    ("granite4_vision", 2, ParallelConfig(tensor=2, encoder_placement=EncoderPlacement.INLINE)),
    ("deepstack_l", 2, ParallelConfig(distributed_optimizer=True)),
    ("qwen3_vl", 2, ParallelConfig(pipeline=2, encoder_chunk_views=1)),
]


@pytest.mark.parametrize(
    ("model", "num_ranks", "parallel"),
    [pytest.param(*row, marks=[pytest.mark.slow] * (number > 0)) for number, row in enumerate(LAYOUTS)],
)
def test_layout_equals_one_rank(ranks: Pools, model: str, num_ranks: int, parallel: ParallelConfig) -> None:
    expected: Trial = ranks(1).run(run_trial, recipe_of(model))[0]
    actual: Trial = ranks(num_ranks).run(run_trial, recipe_of(model, parallel))[0]
    assert actual.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert actual.gradient_norms == pytest.approx(expected.gradient_norms, rel=GRADIENT_TOLERANCE)
    error, name = worst(actual.parameters, expected.parameters)
    assert error <= PARAMETER_TOLERANCE, f"parameter {name} after three steps"


PARTS = {Part.VISION: "model.vision_tower.", Part.PROJECTOR: "model.mm_projector.", Part.LANGUAGE: "model.layers."}


def what_learns(rank: int, recipe: Recipe) -> set[str]:
    """Published names of the parameters that learn."""
    from megatron_deepstack.model.build import build_model, freeze

    groups = groups_for(ParallelConfig())
    model = build_model(recipe.model, ParallelConfig(), Precision.FP32, groups, recipe.lora)
    freeze(model, recipe.train.trainable)
    modules = [(model.encoder, model.encoder_rules), *zip(model.chunks, model.chunk_rules, strict=True)]
    return {
        name
        for module, rules in modules
        for own, parameter in module.named_parameters()
        if parameter.requires_grad
        for name in rules[own].names
    }


@pytest.mark.parametrize("model", ["qwen3_vl", "granite4_vision"])
@pytest.mark.parametrize("part", list(PARTS), ids=str)
def test_a_frozen_part_is_frozen_whole(ranks: Pools, model: str, part: Part) -> None:
    """Mergers and Q-Formers of stacks are the projector: they learn with it, and with nothing else."""
    recipe = recipe_of(model, lora=LoraConfig())
    learning = ranks(1).run(what_learns, replace(recipe, train=replace(recipe.train, trainable=(part,))))[0]
    outside = ("model.embed_tokens.", "model.norm.", "lm_head.")
    own = PARTS[part], *(outside if part is Part.LANGUAGE else ("model.image_newline",) * (part is Part.PROJECTOR))
    assert learning
    assert all(name.startswith(own) for name in learning)
    if part is Part.PROJECTOR:
        stacks = "deepstack_merger_list" if model == "qwen3_vl" else "spatial_projectors"
        assert any(stacks in name for name in learning)


@pytest.mark.parametrize("model", list(MODELS))
def test_of_a_part_with_adapters_they_alone_learn(ranks: Pools, model: str) -> None:
    lora = replace(EVERYWHERE, targets=(), vision_targets=(LoraTarget.QKV, LoraTarget.MLP_OUT))
    recipe = recipe_of(model, lora=lora)
    recipe = replace(recipe, train=replace(recipe.train, trainable=(Part.VISION, Part.PROJECTOR)))
    learning = ranks(1).run(what_learns, recipe)[0]
    assert all("lora_" in name for name in learning)
    tower = {name.rsplit(".", 3)[1] for name in learning if name.startswith("model.vision_tower.") and "_B" in name}
    assert tower == ({"qkv", "linear_fc2"} if model == "qwen3_vl" else {"q_proj", "k_proj", "v_proj", "fc2"})
    assert any(name.startswith("model.mm_projector.") for name in learning)
