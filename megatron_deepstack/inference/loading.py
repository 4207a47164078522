"""Models ready to answer, on one rank: of a run's newest whole checkpoint, or of a folder of weights."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from megatron_deepstack.checkpoint.content.identity import model_identity, require_same
from megatron_deepstack.checkpoint.folder import checkpoints_folder, step_folders
from megatron_deepstack.checkpoint.load import load
from megatron_deepstack.checkpoint.verification import newest_whole_together
from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.convert.exported_folder import read_exported
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.model.build import RankModel, build_model, fill_model
from megatron_deepstack.model.layers.plain_linears import simplify_linears
from megatron_deepstack.parallel.agree import phase
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.step.engine import Engine


def require_checkpoint(recipe: Recipe) -> None:
    """Raise CheckpointError if the run has no checkpoint. None is read, so this is quick before ranks start."""
    if not step_folders(recipe.run_dir):
        raise _no_checkpoint(recipe)


def _no_checkpoint(recipe: Recipe) -> CheckpointError:
    begun = sorted(checkpoints_folder(recipe.run_dir).glob("step_*.partial"))
    if begun:
        return CheckpointError(
            f"{recipe.run_dir}: holds no finished checkpoint: {begun[-1].name} is being written, or its writing was "
            "cut off. Wait until the run says that it is saved, or run `train` again"
        )
    return CheckpointError(f"{recipe.run_dir}: holds no checkpoint; run `train` first, or name another run")


def load_engine(recipe: Recipe, groups: Groups) -> Engine:
    """`load_newest` without the step.

    Args:
        recipe: The run's recipe.
        groups: The groups of this rank.

    Returns:
        The model on this rank, without gradients.

    Raises:
        CheckpointError: As `load_newest`.
    """
    return load_newest(recipe, groups)[0]


def load_newest(recipe: Recipe, groups: Groups) -> tuple[Engine, int]:
    """Load a run's newest whole checkpoint, ready for forward passes. Collective over all ranks.

    Rank 0 of the replica names newer checkpoints that are damaged, on stderr.

    Args:
        recipe: The run's recipe.
        groups: The groups of this rank.

    Returns:
        The model on this rank, without gradients, and the training steps after which it was saved.

    Raises:
        CheckpointError: There is no whole checkpoint, or it holds another model.
    """
    checkpoint, faults = newest_whole_together(recipe.run_dir)
    if checkpoint is None:
        raise _no_checkpoint(recipe)
    if groups.replica_rank == 0:
        for fault in faults:
            print(f"not whole, passed over: {fault}", file=sys.stderr)
    require_same(checkpoint.path, checkpoint.manifest.facts, model_identity(recipe))
    model = _build(recipe, groups)
    started = time.monotonic()
    try:
        load(checkpoint, model, None)
    except (CheckpointError, OSError) as error:
        if checkpoint.path.is_dir():
            raise
        raise CheckpointError(
            f"{checkpoint.path}: was deleted while it was read, since a run that trains there keeps the newest "
            "`checkpoint.keep` alone; run the same command again"
        ) from error
    if groups.replica_rank == 0:
        print(f"checkpoint {checkpoint.path.name} read in {time.monotonic() - started:.1f} s", file=sys.stderr)
    return _engine(recipe, model, groups), checkpoint.manifest.step


def load_folder(recipe: Recipe, folder: str | Path, groups: Groups) -> Engine:
    """Load a folder of weights, ready for forward passes. Collective over all ranks; each reads what it needs.

    Args:
        recipe: Its model and the layout.
        folder: See `convert.exported_folder.read_exported`.
        groups: The groups of this rank.

    Returns:
        The model on this rank, without gradients.

    Raises:
        CheckpointError: On every rank: a file is damaged, or the folder holds another model than the recipe's.
    """
    started = time.monotonic()
    model = _build(recipe, groups)
    with phase():
        tensors = read_exported(folder).tensors

        def source(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            if name not in tensors or tensors[name].shape != shape:
                found = f"has shape {tensors[name].shape}" if name in tensors else "is not there"
                raise CheckpointError(
                    f"{folder}: {name} {found}, the model needs shape {shape}; leave out the changes to `model`, which "
                    "its config.json describes"
                )
            return tensors[name].read()

        fill_model(model, source, groups.decoder.tp)
    if groups.replica_rank == 0:
        print(f"{folder} read in {time.monotonic() - started:.1f} s", file=sys.stderr)
    return _engine(recipe, model, groups)


def _build(recipe: Recipe, groups: Groups) -> RankModel:
    """The model without weights. FP8 is for training alone, whose parameters are bf16 then."""
    precision = Precision.BF16 if recipe.train.precision is Precision.FP8 else recipe.train.precision
    model = build_model(recipe.model, recipe.parallel, precision, groups, recipe.lora)
    make_ready(model)
    return model


def make_ready(model: RankModel) -> None:
    """Let a model compute without gradients alone. Not collective.

    Args:
        model: What this rank holds; changed in place.
    """
    modules: list[torch.nn.Module] = [model.encoder, *model.chunks]
    for module in modules:
        module.requires_grad_(False)
        module.eval()
        if model.config.tensor_model_parallel_size == 1:
            simplify_linears(module)
    for chunk in model.chunks:
        chunk.prepare_tokens()


def _engine(recipe: Recipe, model: RankModel, groups: Groups) -> Engine:
    return Engine(
        model=model,
        model_config=recipe.model,
        decoder_ddp=[],
        encoder_ddp=None,
        groups=groups,
        parallel=recipe.parallel,
    )
