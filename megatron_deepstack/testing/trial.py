"""A few training steps of a tiny recipe on the ranks of a pool, and everything they lead to, for comparing layouts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.order.sampler import global_batch
from megatron_deepstack.planning.batch.step_plan import plan_training_step
from megatron_deepstack.testing.tiny import tiny_samples, tiny_share, unit_pixels


@dataclass(slots=True)
class Trial:
    """What a run of a tiny recipe leaves; tensors under published names."""

    losses: list[float] = field(default_factory=list)
    balance_losses: list[float | None] = field(default_factory=list)
    """The loss that balances experts, without its weight."""
    busiest_experts: list[float | None] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    first_gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)


def run_trial(
    rank: int,
    recipe: Recipe,
    num_samples: int = 8,
    seed: int = 0,
    truncate: bool = False,
    watch: AbstractContextManager[Any] | None = None,
) -> Trial | None:
    """Train `recipe.train.steps` steps on this rank, as `RankPool.run` calls it. Collective over all ranks.

    Args:
        rank: Number of this rank.
        recipe: A tiny recipe.
        num_samples: Samples to train on.
        seed: What they are drawn from.
        truncate: Cut samples that are longer than `train.seq_length`.
        watch: Entered for each step's gradients, and again for each update; not for what surrounds them.

    Returns:
        What came of it, on rank 0; None elsewhere.
    """
    from megatron_deepstack.model.build import build_model, fill_model, freeze
    from megatron_deepstack.model.init import random_source
    from megatron_deepstack.step.clock import StepClock
    from megatron_deepstack.step.engine import build_engine
    from megatron_deepstack.step.train_step import forward_backward
    from megatron_deepstack.testing.compare import gather_published, main_gradient
    from megatron_deepstack.testing.ranks import groups_for
    from megatron_deepstack.training.optim.optimizer import Optimizer

    train = recipe.train
    groups = groups_for(recipe.parallel)
    model = build_model(
        recipe.model, recipe.parallel, train.precision, groups, recipe.lora, train.fp8_scaling, recipe.speed
    )
    fill_model(model, random_source(recipe.model, train.seed), groups.decoder.tp)
    freeze(model, train.trainable)
    engine = build_engine(model, recipe.model, recipe.parallel, groups)
    optimizer = Optimizer(engine, recipe.optimizer, train.precision, train.steps)
    samples = tiny_samples(recipe.model, num_samples, seed)
    trial = Trial()
    for step in range(train.steps):
        order = global_batch(train.seed, step, train.global_batch_size, num_samples)
        batch = [samples[int(i)] for i in order]
        planned, images = tiny_share(batch, recipe, groups.place.dp, groups.axes.dp, truncate)
        plan = plan_training_step(recipe.model, recipe.parallel, train, planned, groups.replica_rank)
        pixels = unit_pixels(recipe.model, images, plan)
        with watch or nullcontext():
            loss = forward_backward(engine, plan, pixels, StepClock())
        if step == 0 and not recipe.parallel.distributed_optimizer:
            trial.first_gradients = gather_published(model, groups, main_gradient)
        trial.losses.append(loss.mean)
        if loss.experts is not None:
            trial.balance_losses.append(loss.experts.balance_loss)
            trial.busiest_experts.append(loss.experts.busiest_expert)
        with watch or nullcontext():
            trial.gradient_norms.append(optimizer.step(step).gradient_norm)
    engine.gather_parameters()
    trial.parameters = gather_published(model, groups, lambda parameter: parameter)
    return trial if rank == 0 else None
