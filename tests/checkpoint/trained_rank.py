"""A rank that trains a tiny recipe on made-up samples and saves it, for tests of what lands on the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.testing.tiny import tiny_recipe, tiny_samples, tiny_share, unit_pixels

State = dict[str, torch.Tensor]


def saving_recipe(folder: Path, parallel: ParallelConfig | None = None, **changes: object) -> Recipe:
    """A tiny recipe whose run folder is `folder`; `changes` are arguments of `tiny_recipe`."""
    recipe = tiny_recipe(parallel=parallel or ParallelConfig(pipeline=2), **changes)  # type: ignore[arg-type]
    return replace(recipe, run_dir=str(folder), train=replace(recipe.train, steps=100))


class TrainedRank:
    """Model, optimizer and saver of one rank of a pool. Every method is collective."""

    def __init__(self, recipe: Recipe, initial_seed: int | None = None) -> None:
        """Weights are drawn from `initial_seed` where it is given, and the order of samples from the recipe's seed."""
        from megatron_deepstack.checkpoint.content.identity import model_identity
        from megatron_deepstack.checkpoint.saving.saver import Saver
        from megatron_deepstack.model.build import build_model, fill_model, freeze
        from megatron_deepstack.model.init import random_source
        from megatron_deepstack.step.engine import build_engine
        from megatron_deepstack.testing.ranks import groups_for
        from megatron_deepstack.training.optim.optimizer import Optimizer

        self.recipe, self.groups = recipe, groups_for(recipe.parallel)
        self.model = build_model(
            recipe.model, recipe.parallel, recipe.train.precision, self.groups, recipe.lora, speed=recipe.speed
        )
        fill_model(self.model, random_source(recipe.model, initial_seed or recipe.train.seed), self.groups.decoder.tp)
        freeze(self.model, recipe.train.trainable)
        self.engine = build_engine(self.model, recipe.model, recipe.parallel, self.groups)
        self.optimizer = Optimizer(self.engine, recipe.optimizer, recipe.train.precision, recipe.train.steps)
        self.saver = Saver(recipe, self.model, self.optimizer.chained, model_identity(recipe), self.groups.axes)
        self.samples = tiny_samples(recipe.model, 8)
        self.done = 0
        self.gradient_norm = 0.0

    def step(self) -> float:
        """Train one step; the loss."""
        from megatron_deepstack.data.order.sampler import global_batch
        from megatron_deepstack.planning.batch.step_plan import plan_training_step
        from megatron_deepstack.step.clock import StepClock
        from megatron_deepstack.step.train_step import forward_backward

        recipe, train = self.recipe, self.recipe.train
        order = global_batch(train.seed, self.done, train.global_batch_size, len(self.samples))
        batch = [self.samples[int(i)] for i in order]
        planned, images = tiny_share(batch, recipe, self.groups.place.dp, self.groups.axes.dp)
        plan = plan_training_step(recipe.model, recipe.parallel, train, planned, self.groups.replica_rank)
        loss = forward_backward(self.engine, plan, unit_pixels(recipe.model, images, plan), StepClock())
        self.gradient_norm = self.optimizer.step(self.done).gradient_norm
        self.done += 1
        return loss.mean

    def save(self) -> Path:
        """Write a checkpoint; its folder."""
        self.engine.gather_parameters()
        self.saver.begin(self.done)
        saved = self.saver.finish()
        assert saved is not None
        return saved.path

    def published(self) -> State:
        """A copy of all weights by their published names, whole."""
        from megatron_deepstack.testing.compare import gather_published

        self.engine.gather_parameters()
        return gather_published(self.model, self.groups, lambda parameter: parameter)

    def load(self, path: Path) -> None:
        """Take over a checkpoint."""
        from megatron_deepstack.checkpoint.folder import verify
        from megatron_deepstack.checkpoint.load import load
        from megatron_deepstack.checkpoint.saving.commit import layout_facts

        checkpoint = verify(path)
        layout = layout_facts(self.groups.axes, self.recipe.parallel)
        load(checkpoint, self.model, self.optimizer.chained, layout)
        self.done = checkpoint.manifest.step

    def state(self) -> State:
        """A copy of everything that this rank's updates change."""
        modules = [*self.model.chunks, self.model.encoder]
        found = {f"{n}.{name}": p for n, module in enumerate(modules) for name, p in module.named_parameters()}
        for number, single in enumerate(self.optimizer.chained.chained_optimizers):
            places = (p for group in single.optimizer.param_groups for p in group["params"])
            for place, parameter in enumerate(places):
                found[f"main.{number}.{place}"] = parameter
                for name, tensor in single.optimizer.state[parameter].items():
                    found[f"{name}.{number}.{place}"] = tensor
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def differing(ours: State, theirs: State) -> list[str]:
    """Names of tensors that are not equal bit for bit."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def plain_tensors(rank: int, path: str) -> State:
    """Every tensor of a checkpoint, whole, but for random states. On one rank of a pool."""
    from megatron.core import dist_checkpointing

    found = dist_checkpointing.load_plain_tensors(path)
    tensors = {key: tensor for key, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    return {key: tensor for key, tensor in tensors.items() if not key.startswith("random.")}
