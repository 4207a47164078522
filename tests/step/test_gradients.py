"""Gradient buffers that are not cleared: what a step leaves in them does not depend on what was there before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_recipe, tiny_samples, tiny_share, unit_pixels

Pools = Callable[[int], RankPool]


def _same_from_garbage(rank: int, recipe: Recipe) -> tuple[bool, bool, bool]:
    """Whether a step gives the same bits from zeros, from NaN, and whether a part without gradients is cleared."""
    from megatron_deepstack.model.build import build_model, fill_model, freeze
    from megatron_deepstack.model.init import random_source
    from megatron_deepstack.planning.batch.step_plan import plan_step
    from megatron_deepstack.step.clock import StepClock
    from megatron_deepstack.step.engine import build_engine
    from megatron_deepstack.step.train_step import forward_backward

    groups, parallel = groups_for(recipe.parallel), recipe.parallel
    per_replica = parallel.pipeline * parallel.tensor
    num_replicas = 2 // per_replica
    samples = tiny_samples(recipe.model, recipe.train.global_batch_size, 3)
    model = build_model(recipe.model, recipe.parallel, recipe.train.precision, groups)
    fill_model(model, random_source(recipe.model, 1), groups.decoder.tp)
    freeze(model, recipe.train.trainable)
    engine = build_engine(model, recipe.model, recipe.parallel, groups)
    planned, images = tiny_share(samples, recipe, rank // per_replica, num_replicas)
    plan = plan_step(recipe.model, recipe.parallel, planned, groups.replica_rank)
    pixels = unit_pixels(recipe.model, images, plan)
    parameters = [p for ddp in engine.wrapped for p in ddp.params_with_grad]

    def gradients() -> list[torch.Tensor]:
        forward_backward(engine, plan, pixels, StepClock())
        return [parameter.main_grad.clone() for parameter in parameters]

    def fill(value: float) -> None:
        for parameter in parameters:
            parameter.main_grad.fill_(value)

    first = gradients()
    fill(float("nan"))
    second = gradients()
    for ddp in engine.wrapped:
        ddp.zero_grad_buffer()
    fill(1.0)
    for ddp in engine.wrapped:
        ddp.finish_grad_sync()
    return (
        all(torch.equal(one, other) for one, other in zip(first, second, strict=True)),
        any(bool(one.any()) for one in first),
        not any(bool(parameter.main_grad.any()) for parameter in parameters),
    )


LAYOUTS = {
    "pp2": ParallelConfig(pipeline=2, overlap_grad_reduce=False),
    "dp2-zero": ParallelConfig(distributed_optimizer=True, overlap_grad_reduce=False),
}


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
def test_what_was_in_the_buffers_does_not_matter(ranks: Pools, parallel: ParallelConfig) -> None:
    for same, found, cleared in ranks(2).run(_same_from_garbage, tiny_recipe(parallel=parallel)):
        assert same, "a gradient was added to what was there before"
        assert found, "there are gradients"
        assert cleared, "a parameter without a gradient keeps an old one"
