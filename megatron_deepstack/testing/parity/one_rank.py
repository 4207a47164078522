"""Samples computed by this system on one rank in float32, from a folder of weights or from a run's checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.inference.loading import load_engine, load_folder
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.planning.batch.step_plan import plan_step
from megatron_deepstack.step.engine import Engine
from megatron_deepstack.step.train_step import VisualPass
from megatron_deepstack.testing.parity.drawn import DrawnSample
from megatron_deepstack.testing.ranks import groups_for


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Where weights come from."""

    path: Path
    """A folder of weights, or a run folder."""
    recipe: Recipe
    """Its model."""
    is_run: bool


def answers_on_rank(
    rank: int, weights: Weights, samples: Sequence[DrawnSample], num_new: int
) -> list[tuple[torch.Tensor, tuple[int, ...]]]:
    """Compute samples, and continue each greedily. To be called on the only rank of a pool.

    Args:
        rank: Number of this rank.
        weights: Whose weights.
        samples: What is computed.
        num_new: Tokens that follow each sample.

    Returns:
        Per sample its logits (T, vocabulary) in float32, and the tokens that follow.
    """
    engine = _engine(weights, groups_for(ParallelConfig()))
    found = []
    for sample in samples:
        logits = _logits(engine, sample)
        new: list[int] = []
        last = logits
        for _ in range(num_new):
            new.append(int(last[-1].argmax()))
            tokens = np.concatenate([sample.tokens, np.array(new, np.int64)])
            last = _logits(engine, replace(sample, tokens=tokens, loss_mask=np.ones_like(tokens)))
        found.append((logits, tuple(new)))
    return found


def _engine(weights: Weights, groups: Groups) -> Engine:
    train = replace(weights.recipe.train, precision=Precision.FP32)
    recipe = replace(weights.recipe, parallel=ParallelConfig(), train=train)
    return load_engine(recipe, groups) if weights.is_run else load_folder(recipe, weights.path, groups)


def _logits(engine: Engine, sample: DrawnSample) -> torch.Tensor:
    """(T, vocabulary)."""
    model = engine.model_config
    planned = sample.planned(model)
    plan = plan_step(model, engine.parallel, [[planned]], engine.groups.replica_rank)
    side, native = model.vision.image_size, model.variant.traits.is_native
    chosen = [np.empty((0,) if native else (0, side, side, 3), np.uint8)]
    for unit in plan.routes.units:
        image = sample.pixels[unit.image]
        chosen.append(image.reshape(-1) if native else image[list(unit.views)])
    (logits_BSV,) = VisualPass(engine, plan, torch.from_numpy(np.concatenate(chosen))).logits(plan)
    return logits_BSV[0, : planned.sequence.length, : model.language.vocab_size].float().clone()
