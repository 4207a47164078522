"""A checkpoint of weights alone, written parameter by parameter from full published tensors.

The model is built of fake tensors, which take no memory, so that Megatron can plan the checkpoint as it plans any other
one. Then each parameter is made from the source, written and forgotten. Memory is bounded by the largest parameter (a
few copies of it), whatever the size of the model. Such a checkpoint has step 0 and no optimizer: `train` begins from
it, and `generate`, `ask` and `export` read it like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megatron_deepstack.checkpoint.content.identity import model_identity
from megatron_deepstack.checkpoint.content.state import sharded_state
from megatron_deepstack.checkpoint.folder import checkpoint_path, partial_path
from megatron_deepstack.checkpoint.saving.commit import Commit
from megatron_deepstack.checkpoint.saving.plan import PlannedFile, Planner
from megatron_deepstack.checkpoint.saving.retention import FolderLock
from megatron_deepstack.checkpoint.saving.writer import Item, write_files
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.model.build import RankModel
from megatron_deepstack.model.rules import Rule, Source


def write_weights(
    recipe: Recipe,
    recipe_text: str,
    model: RankModel,
    source: Source,
    progress: Callable[[float], None] = lambda num_bytes: None,
) -> int:
    """Write the checkpoint after step 0 of `recipe.run_dir`. The only rank of a world of one calls it.

    Args:
        recipe: The recipe of the run.
        recipe_text: What the checkpoint keeps as its recipe.
        model: The whole model, of fake tensors.
        source: Published name and shape to the full tensor, which may have any dtype.
        progress: Told the bytes of weights that are written so far.

    Returns:
        Size of the checkpoint in bytes.

    Raises:
        CheckpointError: The source lacks a tensor, or another process writes this checkpoint.
        OSError: The disk refuses.
    """
    plan = Planner().plan(sharded_state(model, None))
    assert plan.metadata is not None
    final, making = checkpoint_path(recipe.run_dir, 0), _Making(_parameters(model), source, progress)
    lock = FolderLock(partial_path(final))
    try:
        files = ((file.name, file.objects, making.tensors(file)) for file in plan.files)
        write_files(partial_path(final), 0, plan.small_files, files)
        commit = Commit(
            facts=model_identity(recipe),
            samples={},
            layout={},
            num_ranks=1,
            recipe_text=recipe_text,
            keep=0,
            keep_every=0,
            weights_alone=True,
        )
        return commit.run(final, 0, plan.metadata)
    finally:
        lock.release()


@dataclass(frozen=True, slots=True)
class _Parameter:
    fake: torch.nn.Parameter
    rule: Rule


def _parameters(model: RankModel) -> dict[int, _Parameter]:
    """The model's parameters by their storage, which the parts of a plan share with them."""
    modules: list[tuple[torch.nn.Module, dict[str, Rule]]] = [(model.encoder, model.encoder_rules)]
    modules += list(zip(model.chunks, model.chunk_rules, strict=True))
    return {
        _storage(parameter): _Parameter(parameter, rules[name])
        for module, rules in modules
        for name, parameter in module.named_parameters()
    }


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Making:
    """The tensors of a plan, made one after another."""

    def __init__(self, parameters: dict[int, _Parameter], source: Source, progress: Callable[[float], None]) -> None:
        self._parameters, self._source, self._progress = parameters, source, progress
        self._num_bytes = 0.0

    def tensors(self, file: PlannedFile) -> Iterator[tuple[Item, torch.Tensor]]:
        """What one file holds; a tensor is gone when the next one is asked for."""
        for item, fake in file.tensors:
            yield item, self._made(fake)
            self._num_bytes += fake.numel() * fake.element_size()
            self._progress(self._num_bytes)

    def _made(self, fake: torch.Tensor) -> torch.Tensor:
        """The part of a parameter that a fake tensor is a view of, in a storage of its own."""
        known = self._parameters[_storage(fake)]
        rule = known.rule
        whole = rule.shard(self._source, 0, 1).to(known.fake.dtype).contiguous()
        assert whole.shape == known.fake.shape, f"{rule.names}: {tuple(whole.shape)} for {tuple(known.fake.shape)}"
        # a tensor that is cut out of a larger one does not begin where its storage does
        part = whole.as_strided(fake.shape, fake.stride(), int(whole.storage_offset() + fake.storage_offset()))
        return part.clone() if part.numel() < whole.numel() or whole.untyped_storage().nbytes() > whole.nbytes else part
