"""What the published code gets wrong, against plain torch: several images, images anywhere, text alone, all mixed.

The oracle handles one sample at a time and cannot mix anything up; here four samples share a micro-batch or a pack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_deepstack.config.choices import Batching, Part, Variant
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, Recipe, StackConfig
from megatron_deepstack.data.order.sampler import global_batch
from megatron_deepstack.model.init import random_source
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.testing.compare import worst
from megatron_deepstack.testing.oracle.model import OracleSample, oracle_forward, oracle_loss
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import TinySample, tiny_model, tiny_recipe, tiny_samples
from megatron_deepstack.testing.trial import Trial, run_trial

NUM_SAMPLES = 8

# Measured worst over all rows: loss 2e-7, gradients 4e-6.
LOSS_TOLERANCE = 3e-6
GRADIENT_TOLERANCE = 1e-4


class Drawn(dict[str, torch.Tensor]):
    """The initial weights under published names, drawn when the oracle asks for them."""

    def __init__(self, model: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> None:
        source = random_source(model, tiny_recipe().train.seed)
        super().__init__({name: source(name, shape).requires_grad_() for name, shape in shapes.items()})


def oracle_sample(model: ModelConfig, sample: TinySample) -> OracleSample:
    labels = np.where(sample.loss_mask.astype(bool), sample.tokens, IGNORE_INDEX)
    pixels = None
    if sample.pixels:
        views = torch.from_numpy(np.concatenate(sample.pixels)).permute(0, 3, 1, 2).float() / 255.0
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (model.vision.mean, model.vision.std))
        pixels = (views - mean) / std
    return OracleSample(
        tokens=torch.from_numpy(sample.tokens), labels=torch.from_numpy(labels), pixel_values=pixels, grids=sample.grids
    )


def expected(recipe: Recipe, shapes: dict[str, tuple[int, ...]], max_tokens: int | None) -> tuple[float, Drawn]:
    """Loss of the first global batch, and weights that hold its gradients."""
    samples = tiny_samples(recipe.model, NUM_SAMPLES)
    order = global_batch(recipe.train.seed, 0, recipe.train.global_batch_size, NUM_SAMPLES)
    chosen = [oracle_sample(recipe.model, samples[int(i)]) for i in order]
    weights = Drawn(recipe.model, shapes)
    logits = oracle_forward(recipe.model, weights, chosen, max_tokens=max_tokens)
    loss = oracle_loss(recipe.model, logits, chosen, max_tokens=max_tokens)
    loss.backward()
    return loss.item(), weights


MODELS = {
    Variant.DEEPSTACK_L: tiny_model(),
    Variant.DEEPSTACK_V: tiny_model(variant=Variant.DEEPSTACK_V, stacks=StackConfig(start=0)),
    Variant.DEEPSTACK_HD: tiny_model(variant=Variant.DEEPSTACK_HD, stacks=StackConfig(start=1)),
    Variant.LLAVA: tiny_model(variant=Variant.LLAVA),
    Variant.LLAVA_ANYRES: tiny_model(variant=Variant.LLAVA_ANYRES),
    Variant.IN_SEQUENCE: tiny_model(variant=Variant.IN_SEQUENCE),
}
PP2, TP2_SP = ParallelConfig(pipeline=2), ParallelConfig(tensor=2, sequence_parallel=True)
LAYOUTS = {
    Variant.DEEPSTACK_L: TP2_SP,
    Variant.DEEPSTACK_V: PP2,
    Variant.DEEPSTACK_HD: TP2_SP,
    Variant.LLAVA: PP2,
    Variant.LLAVA_ANYRES: TP2_SP,
    Variant.IN_SEQUENCE: ParallelConfig(context=2),
}


@pytest.mark.parametrize("variant", LAYOUTS)
def test_a_mixed_pack_equals_the_oracle(ranks: Callable[[int], RankPool], variant: Variant) -> None:
    """Four samples with 0, 1 and 2 images on unlike grids in one pack."""
    recipe = tiny_recipe(MODELS[variant])
    recipe = replace(recipe, train=replace(recipe.train, batching=Batching.PACKED, seq_length=1024))
    _check(ranks(1), recipe, None)


@pytest.mark.parametrize("variant", LAYOUTS)
def test_a_mixed_batch_on_two_ranks_equals_the_oracle(ranks: Callable[[int], RankPool], variant: Variant) -> None:
    """The same four in one micro-batch, side by side and padded, with the model or the sequence cut in two."""
    recipe = tiny_recipe(MODELS[variant], LAYOUTS[variant], micro_batch_size=4)
    recipe = replace(recipe, train=replace(recipe.train, seq_length=1024))
    _check(ranks(2), recipe, None)


def test_truncated_images_equal_the_oracle(ranks: Callable[[int], RankPool]) -> None:
    recipe = tiny_recipe(micro_batch_size=4)
    recipe = replace(recipe, train=replace(recipe.train, seq_length=17, truncate=True))
    _check(ranks(1), recipe, 17)


def _check(pool: RankPool, recipe: Recipe, max_tokens: int | None) -> None:
    recipe = replace(recipe, train=replace(recipe.train, steps=1, trainable=tuple(Part)))
    trial: Trial = pool.run(run_trial, recipe, NUM_SAMPLES, 0, max_tokens is not None)[0]
    shapes = {name: tuple(value.shape) for name, value in trial.parameters.items()}
    loss, weights = expected(recipe, shapes, max_tokens)
    assert trial.losses[0] == pytest.approx(loss, rel=LOSS_TOLERANCE)
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    error, name = worst(trial.first_gradients, gradients)
    assert error <= GRADIENT_TOLERANCE, f"gradient of {name}"
