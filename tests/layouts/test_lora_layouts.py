"""LoRA: gradients against plain torch, every layout against one rank, and what merging leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_mixed_batches import NUM_SAMPLES, oracle_sample
from test_training_layouts import rows

from megatron_deepstack.config.choices import LoraTarget, Part, Precision, Recompute
from megatron_deepstack.config.schema import LanguageConfig, LoraConfig, ParallelConfig, Recipe
from megatron_deepstack.data.order.sampler import global_batch
from megatron_deepstack.model.init import random_source
from megatron_deepstack.planning.batch.step_plan import plan_step
from megatron_deepstack.testing.compare import gather_published, main_gradient, worst
from megatron_deepstack.testing.oracle.model import oracle_forward, oracle_loss
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_model, tiny_recipe, tiny_samples, tiny_share, unit_pixels
from megatron_deepstack.testing.trial import Trial, run_trial

Pools = Callable[[int], RankPool]
Tensors = dict[str, torch.Tensor]
LORA = LoraConfig(rank=3, alpha=6.0)

# Measured worst over the layouts of two ranks, float32: loss 7e-8, gradients 1.4e-6, parameters 1.8e-6.
LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 3e-5
PARAMETER_TOLERANCE = 1e-4

GROUPED = LanguageConfig(
    vocab_size=61, hidden_size=32, ffn_hidden_size=48, num_layers=8, num_heads=4, num_kv_heads=2, qkv_bias=True
)


def lora_recipe(parallel: ParallelConfig | None = None, **changes: object) -> Recipe:
    return replace(
        tiny_recipe(tiny_model(language=GROUPED), parallel, trainable=(Part.PROJECTOR, Part.LANGUAGE)),
        lora=replace(LORA, **changes),  # type: ignore[arg-type]
    )


def stirred(recipe: Recipe) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """The initial weights, but with B drawn too: where B is zero, no gradient reaches A."""
    drawn = random_source(recipe.model, recipe.train.seed)

    def source(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("lora_B.weight"):
            return 0.3 * random_source(recipe.model, 7)(name.replace("lora_B", "lora_A"), shape)
        return drawn(name, shape)

    return source


def step_gradients(rank: int, recipe: Recipe) -> tuple[float, Tensors, Tensors] | None:
    """Loss, gradients and weights of a first step from stirred adapters, under published names."""
    from megatron_deepstack.model.build import build_model, fill_model, freeze
    from megatron_deepstack.step.clock import StepClock
    from megatron_deepstack.step.engine import build_engine
    from megatron_deepstack.step.train_step import forward_backward

    train, groups = recipe.train, groups_for(recipe.parallel)
    model = build_model(recipe.model, recipe.parallel, train.precision, groups, recipe.lora)
    fill_model(model, stirred(recipe), groups.decoder.tp)
    freeze(model, train.trainable)
    engine = build_engine(model, recipe.model, recipe.parallel, groups)
    samples = tiny_samples(recipe.model, NUM_SAMPLES)
    order = global_batch(train.seed, 0, train.global_batch_size, NUM_SAMPLES)
    planned, images = tiny_share([samples[int(i)] for i in order], recipe, groups.place.dp, groups.axes.dp)
    plan = plan_step(recipe.model, recipe.parallel, planned, groups.replica_rank)
    loss = forward_backward(engine, plan, unit_pixels(recipe.model, images, plan), StepClock()).mean
    gradients = gather_published(model, groups, main_gradient)
    weights = gather_published(model, groups, lambda parameter: parameter)
    return (loss, gradients, weights) if rank == 0 else None


def merged(weights: Tensors, lora: LoraConfig) -> Tensors:
    """What the adapters make of the base weights, differentiable; adapters themselves left out."""
    scale = lora.alpha / lora.rank
    shared = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    shared |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    result = {}
    for name, weight in weights.items():
        *path, linear, kind = name.split(".")
        b = ".".join([*path, linear, "lora_B", kind])
        if "lora_" not in name:
            result[name] = weight
            if kind == "weight" and b in weights:
                a = ".".join([*path, shared.get(linear, linear), "lora_A", kind])
                result[name] = weight + scale * weights[b] @ weights[a]
    return result


def test_gradients_equal_the_oracle(ranks: Pools) -> None:
    """Adapters and projector, against autograd through W + alpha / rank * B A in plain torch."""
    recipe = lora_recipe()
    loss, gradients, weights = ranks(1).run(step_gradients, recipe)[0]
    weights = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    samples = tiny_samples(recipe.model, NUM_SAMPLES)
    order = global_batch(recipe.train.seed, 0, recipe.train.global_batch_size, NUM_SAMPLES)
    chosen = [oracle_sample(recipe.model, samples[int(i)]) for i in order]
    logits = oracle_forward(recipe.model, merged(weights, recipe.lora), chosen)
    truth = oracle_loss(recipe.model, logits, chosen)
    truth.backward()
    assert loss == pytest.approx(truth.item(), rel=LOSS_TOLERANCE)
    learned = {name: weight.grad for name, weight in weights.items() if "lora_" in name or "mm_projector" in name}
    assert set(gradients) == set(learned)
    assert len([name for name in learned if "lora_" in name]) == 8 * (4 + 7)  # an A per fused linear, a B per published
    error, name = worst(gradients, {name: grad for name, grad in learned.items() if grad is not None})
    assert error <= GRADIENT_TOLERANCE, f"gradient of {name}"


LAYOUTS = [
    ("tp2", 2, 2, ParallelConfig(tensor=2)),
    ("tp2-sp", 2, 1, ParallelConfig(tensor=2, sequence_parallel=True)),
    ("pp2", 2, 1, ParallelConfig(pipeline=2)),
    ("pp2-vpp2", 2, 1, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    ("cp2", 2, 1, ParallelConfig(context=2)),
    ("dp2-zero", 2, 1, ParallelConfig(distributed_optimizer=True)),
    ("pp2-recompute", 2, 1, ParallelConfig(pipeline=2, recompute=Recompute.FULL, recompute_num_layers=2)),
    ("tp2-recompute", 2, 1, ParallelConfig(tensor=2, sequence_parallel=True, recompute=Recompute.SELECTIVE)),
    ("tp2-pp2-sp", 4, 1, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)),
]


@pytest.mark.parametrize(("num_ranks", "batch", "parallel"), rows(LAYOUTS, {"pp2-vpp2", "dp2-zero"}))
def test_layout_equals_one_rank(ranks: Pools, num_ranks: int, batch: int, parallel: ParallelConfig) -> None:
    """Three steps; and the gradients of a step whose B is not zero."""
    one, recipe = lora_recipe(), lora_recipe(parallel)
    recipe = replace(recipe, train=replace(recipe.train, micro_batch_size=batch))
    expected: Trial = ranks(1).run(run_trial, one)[0]
    actual: Trial = ranks(num_ranks).run(run_trial, recipe)[0]
    assert actual.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert actual.gradient_norms == pytest.approx(expected.gradient_norms, rel=GRADIENT_TOLERANCE)
    error, name = worst(actual.parameters, expected.parameters)
    assert error <= PARAMETER_TOLERANCE, f"parameter {name} after three steps"
    if parallel.distributed_optimizer:
        return
    _, gradients, _ = ranks(1).run(step_gradients, one)[0]
    _, ours, _ = ranks(num_ranks).run(step_gradients, recipe)[0]
    error, name = worst(ours, gradients)
    assert error <= GRADIENT_TOLERANCE, f"gradient of {name}"


def test_only_adapters_and_projector_move(ranks: Pools) -> None:
    """At first the adapted model is the base model; after three steps its base weights are what they were."""
    recipe = lora_recipe()
    trial: Trial = ranks(1).run(run_trial, recipe)[0]
    plain: Trial = ranks(1).run(run_trial, replace(recipe, lora=LoraConfig()))[0]
    assert trial.losses[0] == plain.losses[0]
    source = random_source(recipe.model, recipe.train.seed)
    moved = {name for name, value in trial.parameters.items() if not torch.equal(value, source(name, value.shape))}
    assert moved == {name for name in trial.parameters if "lora_" in name or "mm_projector" in name}


@pytest.mark.parametrize("target", list(LoraTarget))
@pytest.mark.slow
def test_one_target_alone(ranks: Pools, target: LoraTarget) -> None:
    """Each linear can be adapted by itself, under tensor and sequence parallelism."""
    one = lora_recipe(targets=(target,))
    _, gradients, _ = ranks(1).run(step_gradients, one)[0]
    split = replace(one, parallel=ParallelConfig(tensor=2, sequence_parallel=True))
    _, ours, _ = ranks(2).run(step_gradients, split)[0]
    assert set(ours) == set(gradients)
    error, name = worst(ours, gradients)
    assert error <= GRADIENT_TOLERANCE, f"gradient of {name}"


def merged_weights(rank: int, recipe: Recipe) -> Tensors | None:
    from megatron_deepstack.model.build import build_model, fill_model, merge_adapters

    groups = groups_for(recipe.parallel)
    model = build_model(recipe.model, recipe.parallel, recipe.train.precision, groups, recipe.lora)
    fill_model(model, stirred(recipe), groups.decoder.tp)
    weights = gather_published(merge_adapters(model), groups, lambda parameter: parameter)
    return weights if rank == 0 else None


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(ParallelConfig(), id="one", marks=pytest.mark.slow),
        pytest.param(ParallelConfig(tensor=2), id="tp2"),
    ],
)
def test_merging_adds_the_product(ranks: Pools, parallel: ParallelConfig) -> None:
    recipe = lora_recipe(parallel)
    _, _, weights = ranks(1).run(step_gradients, lora_recipe())[0]
    ours = ranks(parallel.tensor).run(merged_weights, recipe)[0]
    expected = merged(weights, recipe.lora)
    assert set(ours) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_bf16_is_near_float32(ranks: Pools) -> None:
    recipe = lora_recipe(ParallelConfig(tensor=2))
    low: Trial = ranks(2).run(run_trial, replace(recipe, train=replace(recipe.train, precision=Precision.BF16)))[0]
    high: Trial = ranks(2).run(run_trial, recipe)[0]
    assert low.losses == pytest.approx(high.losses, rel=2**-6)
