"""A rank's part of a run, set up: groups, model, gradient buffers, optimizer, and what a checkpoint must agree with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_deepstack.checkpoint.content.identity import identity, require_same
from megatron_deepstack.checkpoint.content.state import allocate_states
from megatron_deepstack.checkpoint.load import load
from megatron_deepstack.checkpoint.saving.commit import layout_of
from megatron_deepstack.checkpoint.saving.saver import Saver
from megatron_deepstack.checkpoint.verification import newest_whole_together, remove_leftovers_together
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.convert.published import published_source
from megatron_deepstack.data.order.steps import Share, StepReader, open_training_reader
from megatron_deepstack.model.build import build_model, fill_model, freeze
from megatron_deepstack.model.init import random_source
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.step.engine import Engine, build_engine
from megatron_deepstack.training.optim.optimizer import Optimizer


@dataclass(frozen=True, slots=True)
class Session:
    """Everything the loop works with on this rank."""

    recipe: Recipe
    groups: Groups
    engine: Engine
    optimizer: Optimizer
    reader: StepReader
    facts: dict[str, Any]
    """Identity of the run, see `checkpoint.identity`."""
    saver: Saver
    """Checkpoints of the run."""


def start_session(recipe: Recipe, groups: Groups) -> Session:
    """Build a run on this rank, its weights initialised. Collective over all ranks.

    Raises before anything is built where store and recipe do not fit.
    """
    reader = open_training_reader(recipe, share_of(groups))
    train = recipe.train
    model = build_model(recipe.model, recipe.parallel, train.precision, groups, recipe.lora, train.fp8_scaling)
    source = random_source(recipe.model, recipe.train.seed, recipe.train.init_std)
    if recipe.train.init_from is not None:
        source = published_source(
            recipe.train.init_from, fallback=source, model=recipe.model, seq_length=recipe.train.seq_length
        )
    fill_model(model, source, groups.decoder.tp)
    freeze(model, recipe.train.trainable)
    engine = build_engine(model, recipe.model, recipe.parallel, groups)
    optimizer = Optimizer(engine, recipe.optimizer, recipe.train.precision, recipe.train.steps)
    facts = identity(recipe, plan_hash=reader.store.plan_hash, tokenizer_sha256=reader.store.tokenizer_sha256)
    return Session(
        recipe=recipe,
        groups=groups,
        engine=engine,
        optimizer=optimizer,
        reader=reader,
        facts=facts,
        saver=Saver(recipe, model, optimizer.chained, facts, groups.axes),
    )


def share_of(groups: Groups) -> Share:
    """What this rank reads."""
    return Share(dp=groups.place.dp, num_replicas=groups.axes.dp, replica_rank=groups.replica_rank)


@dataclass(frozen=True, slots=True)
class Resumption:
    """Where a run goes on."""

    step: int
    """Steps done."""
    path: Path | None
    """Checkpoint taken; None for a fresh start."""
    passed_over: tuple[str, ...]
    """A line on each newer checkpoint that was not whole."""


def resume(session: Session) -> Resumption:
    """Load the newest whole checkpoint of the run folder, if it has any; else begin anew. Collective over all ranks.

    Raises CheckpointError if none is whole, if the newest belongs to another model or other data, or if the folder's
    file system has no locks.
    """
    remove_leftovers_together(session.recipe.run_dir)
    checkpoint, faults = newest_whole_together(session.recipe.run_dir)
    if checkpoint is None:
        allocate_states(session.optimizer.chained)
        return Resumption(step=0, path=None, passed_over=())
    require_same(checkpoint.path, checkpoint.manifest.facts, session.facts)
    layout = layout_of(session.groups.axes, session.recipe.parallel)
    load(checkpoint, session.engine.model, session.optimizer.chained, layout)
    return Resumption(step=checkpoint.manifest.step, path=checkpoint.path, passed_over=tuple(faults))
