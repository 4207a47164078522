"""What a checkpoint costs training: the stall of an asynchronous save against the same save done synchronously.

Trains a small model at PP=2 on two CPU ranks (or one rank with --ranks 1) and saves it in turns: synchronously, and
asynchronously while steps go on. The stall is all time in which the training thread was held up for a save: planning,
waiting for the copy before the next update, agreeing, finishing. Steps while files are written are compared with steps
without a save. The last line is one JSON object. Run on an otherwise idle machine: python tools/bench_checkpoint.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from megatron_deepstack.config.choices import SaveMode
from megatron_deepstack.config.schema import (
    CheckpointConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    StackConfig,
    VisionConfig,
)
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import TinySample, tiny_recipe, unit_pixels

MICRO_BATCHES, VIEWS, TEXT = 4, 5, 128
WARM_UP_SAVES = 3
"""Ranks exchange their plans in the first two saves, and the memory for copies is new in the first."""


@dataclass(slots=True)
class Measured:
    """Seconds on one rank."""

    plain_step: list[float] = field(default_factory=list)
    step_during_write: list[float] = field(default_factory=list)
    sync_save: list[float] = field(default_factory=list)
    stall: list[float] = field(default_factory=list)
    begin: list[float] = field(default_factory=list)
    until_whole: list[float] = field(default_factory=list)
    num_bytes: int = 0


def model_of(hidden: int, layers: int) -> ModelConfig:
    """A model with a small tower, so that most of a checkpoint is the decoder.

    Args:
        hidden: Width of the decoder.
        layers: Its layers.
    """
    language = LanguageConfig(
        vocab_size=4096, hidden_size=hidden, ffn_hidden_size=hidden * 11 // 4, num_layers=layers, num_heads=8
    )
    vision = VisionConfig(
        image_size=56, patch_size=14, hidden_size=128, ffn_hidden_size=512, num_layers=2, num_heads=4, select_layer=-1
    )
    return ModelConfig(vision=vision, language=language, stacks=StackConfig(slots=(0, 1, 2, 3)))


def recipe_of(model: ModelConfig, ranks: int, distributed_optimizer: bool, run_dir: Path) -> Recipe:
    """A recipe of many steps.

    Args:
        model: The model.
        ranks: Pipeline stages, or replicas with the distributed optimizer.
        distributed_optimizer: Replicas that divide the optimizer's states, instead of stages.
        run_dir: Where checkpoints are written.
    """
    stages = 1 if distributed_optimizer else ranks
    parallel = ParallelConfig(pipeline=stages, distributed_optimizer=distributed_optimizer)
    recipe = replace(tiny_recipe(model, parallel), run_dir=str(run_dir), checkpoint=CheckpointConfig(keep=1))
    return replace(recipe, train=replace(recipe.train, steps=10_000))


def samples_of(model: ModelConfig) -> list[TinySample]:
    """One sample for each micro-batch: an image of five views and `TEXT` tokens."""
    rng, size = np.random.default_rng(0), model.vision.image_size
    samples = []
    for _ in range(MICRO_BATCHES):
        tokens = rng.integers(1, model.language.vocab_size, TEXT)
        tokens[1] = IMAGE_TOKEN_ID
        pixels = rng.integers(0, 256, (VIEWS, size, size, 3), dtype=np.uint8)
        samples.append(TinySample(tokens, (tokens != IMAGE_TOKEN_ID).astype(np.int64), ((2, 2),), (pixels,)))
    return samples


class Bench:
    """A rank that trains and saves. Everything is collective over all ranks."""

    def __init__(self, recipe: Recipe) -> None:
        """Build the model, the optimizer and a saver for each mode.

        Args:
            recipe: As `recipe_of` makes it.
        """
        from megatron_deepstack.checkpoint.saving.saver import Saver
        from megatron_deepstack.model.build import build_model, fill_model, freeze
        from megatron_deepstack.model.init import random_source
        from megatron_deepstack.planning.batch.step_plan import plan_step
        from megatron_deepstack.step.engine import build_engine
        from megatron_deepstack.training.optim.optimizer import Optimizer

        groups = groups_for(recipe.parallel)
        model = build_model(recipe.model, recipe.parallel, recipe.train.precision, groups)
        fill_model(model, random_source(recipe.model, 0), groups.decoder.tp)
        freeze(model, recipe.train.trainable)
        self.engine = build_engine(model, recipe.model, recipe.parallel, groups)
        self.optimizer = Optimizer(self.engine, recipe.optimizer, recipe.train.precision, recipe.train.steps)
        samples = [[s] for s in samples_of(recipe.model)]
        planned = [[s.planned(recipe.model, 4096) for s in row] for row in samples]
        self.plan = plan_step(recipe.model, recipe.parallel, planned, groups.replica_rank)
        self.pixels = unit_pixels(recipe.model, [[s.pixels for s in row] for row in samples], self.plan)
        chained, axes = self.optimizer.chained, groups.axes
        self.savers = {
            mode: Saver(replace(recipe, checkpoint=replace(recipe.checkpoint, mode=mode)), model, chained, {}, axes)
            for mode in SaveMode
        }
        self.step_number = 0

    def step(self) -> float:
        """Seconds of a training step, without what it waited for a save."""
        from megatron_deepstack.step.clock import StepClock
        from megatron_deepstack.step.train_step import forward_backward

        begin = time.perf_counter()
        self.savers[SaveMode.ASYNC].take_stall_seconds()
        forward_backward(self.engine, self.plan, self.pixels, StepClock())
        self.optimizer.step(self.step_number)
        self.step_number += 1
        return time.perf_counter() - begin - self.savers[SaveMode.ASYNC].take_stall_seconds()

    def synchronous(self) -> float:
        """Seconds of a save that training waits for."""
        import torch.distributed as dist

        dist.barrier()
        begin = time.perf_counter()
        self.savers[SaveMode.SYNC].begin(self.step_number)
        self.savers[SaveMode.SYNC].finish()
        return time.perf_counter() - begin

    def asynchronous(self, measured: Measured) -> None:
        """A save while training goes on.

        Args:
            measured: Gets the seconds of the save and of the steps beside it.
        """
        import torch.distributed as dist

        saver = self.savers[SaveMode.ASYNC]
        dist.barrier()
        begin = time.perf_counter()
        saver.begin(self.step_number)
        measured.begin.append(time.perf_counter() - begin)
        saved = None
        while saved is None:
            measured.step_during_write.append(self.step())
            saved = saver.poll()
        measured.stall.append(saved.stall_seconds)
        measured.until_whole.append(saved.seconds)
        measured.num_bytes = saved.num_bytes


def bench(rank: int, recipe: Recipe, repeats: int) -> Measured:
    """Measure on one rank, which every rank of the pool does. Collective over all ranks.

    Args:
        rank: Number of this rank.
        recipe: As `recipe_of` makes it.
        repeats: Saves of each kind.

    Returns:
        Seconds, without those of the first saves.
    """
    case = Bench(recipe)
    measured = Measured()
    case.step()
    for _ in range(WARM_UP_SAVES):
        case.asynchronous(Measured())
        case.synchronous()
    for _ in range(repeats):
        measured.plain_step.append(case.step())
        measured.sync_save.append(case.synchronous())
        measured.plain_step.append(case.step())
        case.asynchronous(measured)
    for saver in case.savers.values():
        saver.close()
    return measured


def report(by_rank: list[Measured]) -> dict[str, float]:
    """Print what was measured, as medians of the rank that waited longest.

    Args:
        by_rank: What each rank measured.

    Returns:
        The figures of the last line: shares, seconds and MiB by name.
    """

    def slowest(name: str) -> float:
        return max(statistics.median(getattr(measured, name)) for measured in by_rank)

    sync, stall = slowest("sync_save"), slowest("stall")
    plain, during = slowest("plain_step"), slowest("step_during_write")
    print(f"checkpoint of {by_rank[0].num_bytes / 2**20:.0f} MiB on {len(by_rank)} ranks")
    print(f"  synchronous save      {sync:.3f} s")
    print(f"  asynchronous stall    {stall:.3f} s = {stall / sync:.1%} (begin {slowest('begin'):.3f} s)")
    print(f"  whole on disk after   {slowest('until_whole'):.3f} s")
    print(f"  step                  {plain:.3f} s; while files are written {during:.3f} s ({during / plain - 1:+.1%})")
    return {
        "stall_share": stall / sync,
        "stall_seconds": stall,
        "sync_seconds": sync,
        "step_slowdown": during / plain - 1,
        "mib": by_rank[0].num_bytes / 2**20,
    }


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--distributed-optimizer", action="store_true", help="data-parallel ranks instead of stages")
    parser.add_argument("--folder", default=None, help="where checkpoints are written; a temporary folder if absent")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, RankPool(arguments.ranks, 1200.0) as pool:
        model = model_of(arguments.hidden, arguments.layers)
        recipe = recipe_of(model, arguments.ranks, arguments.distributed_optimizer, Path(folder))
        found = report(pool.run(bench, recipe, arguments.repeats))
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
