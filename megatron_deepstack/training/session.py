"""A rank's part of a run, set up in phases that all ranks leave together: an error of one is shown once, with its rank.

1. stores         checked by the first rank of each node, then opened by every rank
2. layers         what this recipe builds can run on every rank, and is the same on all
3. checkpoint     the newest whole one is found; only where there is none are starting weights read
4. model          decoder chunks and encoder, filled where there is no checkpoint
5. resumption     weights, optimizer and random states of the checkpoint
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_deepstack.checkpoint.content.identity import differences, identity, require_same_run
from megatron_deepstack.checkpoint.content.state import allocate_states
from megatron_deepstack.checkpoint.folder import Checkpoint
from megatron_deepstack.checkpoint.load import load
from megatron_deepstack.checkpoint.saving.commit import layout_facts
from megatron_deepstack.checkpoint.saving.saver import Saver
from megatron_deepstack.checkpoint.verification import newest_whole_together, remove_leftovers_together
from megatron_deepstack.config.choices import OptIn, Precision
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.convert.published import published_source, starting_weights
from megatron_deepstack.data.order.opening import checked_store, known_store, open_reader, open_training_reader
from megatron_deepstack.data.order.steps import Share, StepReader
from megatron_deepstack.errors import ConfigError, DataError
from megatron_deepstack.inference.evaluate.exam import OpenedExam
from megatron_deepstack.model.build import RankModel, build_model, fill_adapters, fill_model, freeze
from megatron_deepstack.model.init import random_source
from megatron_deepstack.model.layers.fp8 import require_fp8
from megatron_deepstack.model.layers.specs import uses_transformer_engine
from megatron_deepstack.model.layers.speed import speed_of
from megatron_deepstack.model.published_shapes import decoder_shapes, shapes_of
from megatron_deepstack.parallel.agree import phase
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.parallel.reduce import from_first_rank
from megatron_deepstack.platform.compute.capabilities import capabilities
from megatron_deepstack.platform.compute.user_buffers import make_user_buffers
from megatron_deepstack.run_folder.starting_weights import StartingWeights
from megatron_deepstack.step.engine import Engine, build_engine
from megatron_deepstack.training.evaluation import open_training_exam
from megatron_deepstack.training.optim.optimizer import Optimizer, require_moments


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a run goes on, and with what data; known before anything is built."""

    reader: StepReader
    held_out: StepReader | None
    """Of the validation store, where the recipe measures the loss of held-out samples."""
    exam: OpenedExam | None
    """The questions, where the recipe asks some at intervals."""
    facts: dict[str, Any]
    """Identity of the run, see `checkpoint.identity`."""
    samples: dict[str, Any]
    """What the run reads, for the message about a checkpoint that belongs to other data."""
    checkpoint: Checkpoint | None
    """The newest whole one; None for a fresh start."""
    passed_over: tuple[str, ...]
    """A line on each newer checkpoint that was not whole."""

    @property
    def step(self) -> int:
        """Steps done."""
        return 0 if self.checkpoint is None else self.checkpoint.manifest.step


@dataclass(frozen=True, slots=True)
class Session:
    """Everything the loop works with on this rank."""

    recipe: Recipe
    groups: Groups
    engine: Engine
    optimizer: Optimizer
    beginning: Beginning
    saver: Saver
    """Checkpoints of the run."""
    starting: StartingWeights | None
    """Where each tensor came from; None where the run goes on from a checkpoint."""

    @property
    def reader(self) -> StepReader:
        """Of the training data."""
        return self.beginning.reader


def begin(recipe: Recipe, groups: Groups) -> Beginning:
    """Phases 1 to 3: open the data and find the newest whole checkpoint. Collective over all ranks.

    Args:
        recipe: The run's recipe.
        groups: The process groups.

    Returns:
        Where the run goes on.

    Raises:
        DeepStackError: The same on every rank, with the rank that met it: a store or tokenizer is missing or does not
            fit, this rank cannot run the recipe's layers, no checkpoint is whole, or the newest belongs to another
            model or other data.
    """
    reader, held_out, exam = _open_data(recipe, share_of(groups))
    facts = identity(recipe, plan_hash=reader.store.plan_hash, tokenizer_sha256=reader.store.tokenizer_sha256)
    samples = {"stores": _stores(recipe), "num_samples": len(reader.store)}
    with phase():
        layers = _layers(recipe)
    with phase():
        _require_alike({**facts, **layers})
    with phase():
        remove_leftovers_together(recipe.run_dir)
        checkpoint, faults = newest_whole_together(recipe.run_dir)
        if checkpoint is not None:
            require_same_run(checkpoint.path, checkpoint.manifest, facts, samples)
    return Beginning(reader, held_out, exam, facts, samples, checkpoint, tuple(faults))


def start_session(recipe: Recipe, groups: Groups, beginning: Beginning | None = None) -> Session:
    """Phase 4: build a run on this rank. Collective over all ranks.

    Weights are initialised only where there is no checkpoint to take them from: starting weights (`train.init_from`)
    may be gone by then, and are large.

    Args:
        recipe: The run's recipe.
        groups: The process groups.
        beginning: What `begin` found; found here if it is not given.

    Returns:
        The session; `resume` follows.

    Raises:
        DeepStackError: As `begin` does, or where starting weights are missing or do not fit.
    """
    beginning = beginning or begin(recipe, groups)
    train = recipe.train
    if recipe.speed.tp_overlap is OptIn.ALWAYS:
        with phase():
            _make_user_buffers(recipe)
    model = build_model(
        recipe.model, recipe.parallel, train.precision, groups, recipe.lora, train.fp8_scaling, recipe.speed
    )
    starting = None
    with phase():
        if beginning.checkpoint is None:
            starting = _initialise(model, recipe, groups)
        elif recipe.lora.rank and beginning.checkpoint.manifest.weights_alone:
            fill_adapters(model, random_source(recipe.model, train.seed, train.init_std), groups.decoder.tp)
        freeze(model, train.trainable)
    if beginning.checkpoint is not None and beginning.checkpoint.manifest.weights_alone:
        with phase():
            load(beginning.checkpoint, model, None)
    engine = build_engine(model, recipe.model, recipe.parallel, groups)
    optimizer = Optimizer(engine, recipe.optimizer, recipe.train.precision, recipe.train.steps)
    return Session(
        recipe=recipe,
        groups=groups,
        engine=engine,
        optimizer=optimizer,
        beginning=beginning,
        saver=Saver(recipe, model, optimizer.chained, beginning.facts, groups.axes, beginning.samples),
        starting=starting,
    )


def _make_user_buffers(recipe: Recipe) -> None:
    """Make the buffers of `speed.tp_overlap`, before the layers that use them. Collective over all ranks."""
    train, parallel = recipe.train, recipe.parallel
    tokens = train.seq_length * train.micro_batch_size // parallel.context
    fp8 = train.precision is Precision.FP8
    make_user_buffers(tokens, recipe.model.language.hidden_size, parallel.tensor, fp8=fp8)


def _initialise(model: RankModel, recipe: Recipe, groups: Groups) -> StartingWeights:
    """Fill a rank's model; where the tensors of the whole model come from, which every rank works out alike."""
    train = recipe.train
    drawn, read = random_source(recipe.model, train.seed, train.init_std), None
    if train.init_from is not None:
        read = published_source(train.init_from, fallback=drawn, model=recipe.model, seq_length=train.seq_length)
    fill_model(model, read or drawn, groups.decoder.tp)
    shapes = {**shapes_of([model.encoder_rules]), **decoder_shapes(recipe.model, recipe.lora)}
    return starting_weights(shapes, read)


def share_of(groups: Groups) -> Share:
    """What this rank reads.

    Args:
        groups: The process groups.

    Returns:
        Its share.
    """
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
    """Phase 5: load the checkpoint that was found, if there was one; else start at step 0. Collective over all ranks.

    Args:
        session: What `start_session` built.

    Returns:
        Where the run goes on.

    Raises:
        CheckpointError: On every rank, if the checkpoint cannot be read into this model.
    """
    checkpoint = session.beginning.checkpoint
    if checkpoint is None:
        allocate_states(session.optimizer.chained)
        return Resumption(step=0, path=None, passed_over=())
    if checkpoint.manifest.weights_alone:
        allocate_states(session.optimizer.chained)
        return Resumption(step=0, path=checkpoint.path, passed_over=session.beginning.passed_over)
    layout = layout_facts(session.groups.axes, session.recipe.parallel)
    with phase():
        load(checkpoint, session.engine.model, session.optimizer.chained, layout)
    return Resumption(step=checkpoint.manifest.step, path=checkpoint.path, passed_over=session.beginning.passed_over)


def is_first_of_node() -> bool:
    """Whether this rank does what one rank of each machine does; LOCAL_RANK says so.

    Returns:
        True for the first, and if LOCAL_RANK is not set.
    """
    return os.environ.get("LOCAL_RANK", "0") == "0"


def check_data(recipe: Recipe) -> None:
    """Open all stores of a recipe once and check that they fit it. Needs no process group.

    Args:
        recipe: The run's recipe.

    Raises:
        DeepStackError: As `data.order.opening.checked_store` does.
    """
    alone = Share(dp=0, num_replicas=1, replica_rank=0)
    open_training_reader(recipe, alone, checked_store)
    if _evaluates(recipe):
        open_reader(recipe, recipe.data.validation_store, alone, checked_store)
    open_training_exam(recipe)


def _open_data(recipe: Recipe, share: Share) -> tuple[StepReader, StepReader | None, OpenedExam | None]:
    """Collective over all ranks. The checks read every sample's length, so one rank of each node does them."""
    with phase():
        if is_first_of_node():
            check_data(recipe)
    with phase():
        path = recipe.data.tokenizer
        if path is not None and not Path(path).exists():
            raise DataError(f"data.tokenizer: {path} is not there; expected a tokenizer that every node can read")
        reader = open_training_reader(recipe, share, known_store)
        held_out = open_reader(recipe, recipe.data.validation_store, share, known_store) if _evaluates(recipe) else None
        exam = open_training_exam(recipe)
    return reader, held_out, exam


def _evaluates(recipe: Recipe) -> bool:
    return bool(recipe.train.validation_interval) and recipe.data.validation_store is not None


def _stores(recipe: Recipe) -> list[str]:
    """The stores that are read, of a mixture with their weights, in words."""
    data = recipe.data
    if data.stores is None:
        return [] if data.store is None else [data.store]
    if data.weights is None:
        return list(data.stores)
    return [f"{path} (weight {weight:g})" for path, weight in zip(data.stores, data.weights, strict=True)]


def _layers(recipe: Recipe) -> dict[str, Any]:
    """Whose layers this rank builds, and with which fusions. Raises ConfigError where it cannot build the recipe's."""
    require_fp8(recipe.train.precision, recipe.train.fp8_scaling, recipe.model.layers)
    require_moments(recipe.optimizer, capabilities())
    layers = "transformer_engine" if uses_transformer_engine(recipe.model.layers) else "local"
    decided = {f"speed.{name}": str(value) for name, value in asdict(speed_of(recipe, capabilities())).items()}
    return {"layers": layers, **decided}


def _require_alike(mine: Mapping[str, Any]) -> None:
    """Raise ConfigError on a rank whose model, data or layers differ from rank 0's. Collective over all ranks."""
    first = json.loads(from_first_rank(json.dumps(mine)))
    different = [f"{name}: {ours}, and on rank 0 {theirs}" for name, ours, theirs in differences(mine, first)]
    if different:
        advice = "give every rank the same recipe, stores of the same content, and the same packages"
        raise ConfigError([f"{one}; {advice}" for one in different])
