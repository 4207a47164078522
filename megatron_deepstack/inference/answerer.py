"""Who is asked: a run, by its newest whole checkpoint, or a folder of weights, such as `export` writes.

Both are a recipe, weights for the ranks, and the way in which questions are prepared. A folder has no recipe, so one is
made from its config.json and the files beside it; what they do not say is taken from the defaults, and is told.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.load import override_recipe
from megatron_deepstack.config.problems import Problem
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.config.sizes import answering_layout
from megatron_deepstack.convert.exported_folder import ExportedFolder, read_exported
from megatron_deepstack.convert.hf_whole import whole_model_of
from megatron_deepstack.data.images.processor import check_store
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.url.cache import CacheConfig
from megatron_deepstack.data.text.probe import probe
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import ConfigError, DataError, StoreError
from megatron_deepstack.inference.ask.preparation import Preparation
from megatron_deepstack.inference.ask.template import template_difference
from megatron_deepstack.inference.loading import load_folder, load_newest, require_checkpoint
from megatron_deepstack.inference.main import open_questions
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN
from megatron_deepstack.planning.check import checked
from megatron_deepstack.run_folder.asked import WEIGHTS_CONFIG, is_run
from megatron_deepstack.run_folder.recipe import checkable_recipe_of_run
from megatron_deepstack.step.engine import Engine


@dataclass(frozen=True, slots=True)
class Answerer(ABC):
    """A model that can be asked. It pickles, since every rank has it."""

    recipe: Recipe
    """Model, layout, precision and tokenizer. `run_dir` is the folder that was named."""

    @abstractmethod
    def require_weights(self) -> None:
        """Raise CheckpointError if it is known at once, without ranks, that there are no weights."""

    @abstractmethod
    def engine(self, groups: Groups) -> tuple[Engine, int | None]:
        """Load the model. Collective over all ranks.

        Args:
            groups: The groups of this rank.

        Returns:
            The model on this rank, without gradients, and the training steps that it has seen if that is known.

        Raises:
            CheckpointError: The weights are damaged or belong to another model.
        """

    @abstractmethod
    def preparation(self, verb: str, say: Callable[[str], None]) -> Preparation:
        """How questions become token ids and views.

        Args:
            verb: What the user called, for messages.
            say: Called with a line where something is unusual.

        Returns:
            The preparation.

        Raises:
            ConfigError: There is no tokenizer.
            DataError: The tokenizer cannot be read, or is another than the model's.
        """

    @abstractmethod
    def open_store(self, path: str) -> Store:
        """Open a store of questions.

        Args:
            path: Its folder or URL.

        Returns:
            The store.

        Raises:
            StoreError: It cannot be used, or does not fit the model or its tokenizer.
        """

    @property
    def num_ranks(self) -> int:
        """Ranks of one replica."""
        parallel = self.recipe.parallel
        return parallel.tensor * parallel.context * parallel.pipeline

    def without_sequence_parallelism(self) -> Self:
        """The same without sequence parallelism, since a step of generation is one token wide; and with all experts."""
        return replace(self, recipe=replace(self.recipe, parallel=answering_layout(self.recipe.parallel)))


@dataclass(frozen=True, slots=True)
class RunAnswerer(Answerer):
    """A run."""

    def require_weights(self) -> None:
        """As the base says."""
        require_checkpoint(self.recipe)

    def engine(self, groups: Groups) -> tuple[Engine, int | None]:
        """As the base says: the newest whole checkpoint."""
        return load_newest(self.recipe, groups)

    def preparation(self, verb: str, say: Callable[[str], None]) -> Preparation:
        """As the base says: as the samples of its store were prepared.

        Args:
            verb: What the user called, for messages.
            say: Called with a line where something is unusual.

        Returns:
            The preparation.

        Raises:
            ConfigError, DataError: As the base says.
        """
        path = self.recipe.data.tokenizer
        if path is None:
            raise ConfigError([f"data.tokenizer: not set; `{verb}` needs it to read questions and to write answers"])
        return Preparation.of_run(self.recipe, load_tokenizer(path), say)

    def open_store(self, path: str) -> Store:
        """As the base says."""
        return open_questions(self.recipe, path)[0]


@dataclass(frozen=True, slots=True)
class FolderAnswerer(Answerer):
    """A folder of weights."""

    unsaid: tuple[str, ...]
    """Fields of `data` that the folder says nothing about."""
    probe: str | None
    """What `data.text.probe.probe` gave for the tokenizer of the training; None if the folder does not say it."""
    fingerprint: str | None
    """Fingerprint of that tokenizer; None if the folder does not say it."""

    @property
    def folder(self) -> str:
        """Its path."""
        return self.recipe.run_dir

    def require_weights(self) -> None:
        """As the base says; names and shapes of its tensors have been compared with its config.json already."""

    def engine(self, groups: Groups) -> tuple[Engine, int | None]:
        """As the base says."""
        return load_folder(self.recipe, self.folder, groups), None

    def preparation(self, verb: str, say: Callable[[str], None]) -> Preparation:
        """As the base says: as the files beside the weights describe it.

        Args:
            verb: What the user called, for messages.
            say: Called with a line about what the folder does not say.

        Returns:
            The preparation.

        Raises:
            ConfigError, DataError: As the base says.
        """
        path = self.recipe.data.tokenizer
        if path is None:
            raise ConfigError(
                [f"data.tokenizer: {self.folder} holds no tokenizer; name the model's with data.tokenizer=PATH"]
            )
        tokenizer = load_tokenizer(path)
        self._require_its(tokenizer)
        if self.unsaid:
            values = ", ".join(f"data.{name}={getattr(self.recipe.data, name)}" for name in self.unsaid)
            say(f"{verb}: {self.folder} does not say how its data was prepared; taken is {values}")
        if "template" in self.unsaid:
            self._compare_templates(tokenizer, lambda text: say(f"{verb}: {self.folder}: {text}"))
        where = f"max_position_embeddings in {self.folder}/{WEIGHTS_CONFIG}, or train.seq_length=N"
        return Preparation.of_recipe(self.recipe, tokenizer, where)

    def open_store(self, path: str) -> Store:
        """As the base says. The tokenizer's files may have been written anew for the folder, so its record counts."""
        store = Store.open(path, cache=CacheConfig.of(self.recipe.data))
        check_store(store, self.recipe.model)
        made = store.attributes.tokenizer["sha256"]
        ours = self.fingerprint or load_tokenizer(str(self.recipe.data.tokenizer)).fingerprint
        if made != ours:
            raise StoreError(
                f"{path}: was made with a tokenizer of sha256 {made[:12]}..., the model in {self.folder} has learned "
                f"with one of {ours[:12]}...; preprocess the questions again with the model's tokenizer"
            )
        return store

    def _compare_templates(self, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
        """Say if the folder's own chat template writes other prompts than the template that is taken for it."""
        whole = whole_model_of(self.recipe.model.variant)
        image = IMAGE_TOKEN if whole is None else whole[1].image_token
        found = template_difference(Path(self.folder), self.recipe.data.template, tokenizer, image)
        if found is not None:
            say(found)

    def _require_its(self, tokenizer: Tokenizer) -> None:
        """Raise DataError for a tokenizer whose ids mean other words, or none, to the model."""
        rows = self.recipe.model.language.vocab_size
        words = [number for number in range(rows, tokenizer.vocab_size) if tokenizer.decode([number])]
        if words or (tokenizer.bos_id or 0) >= rows:
            raise DataError(
                f"{tokenizer.source}: its ids go up to {tokenizer.vocab_size - 1}, and the model in {self.folder} has "
                f"{rows} words, none for {tokenizer.names_from(rows)}; name the model's own tokenizer with "
                "data.tokenizer=PATH"
            )
        if self.probe is not None and probe(tokenizer) != self.probe:
            raise DataError(
                f"{tokenizer.source}: gives other ids than the tokenizer with which the model in {self.folder} was "
                "trained; name that one with data.tokenizer=PATH"
            )


def answerer_at(path: Path, overrides: Sequence[str] = ()) -> Answerer:
    """The run, or the folder of weights, at a path.

    Args:
        path: A run folder, or a folder that `read_exported` can open.
        overrides: Changes to the run's recipe, or to the one that is made for the folder, each `section.field=value`.

    Returns:
        What can be asked; its recipe has been checked.

    Raises:
        ConfigError: The folder is neither, or an override is wrong.
        CheckpointError: The folder describes no model of ours, lacks tensors, or a file of it is damaged.
    """
    if is_run(path):
        return RunAnswerer(checked(*checkable_recipe_of_run(path, overrides)))
    found = read_exported(path)
    return FolderAnswerer(checked(*_recipe_of_folder(found, overrides)), found.unsaid, found.probe, found.fingerprint)


def _recipe_of_folder(found: ExportedFolder, overrides: Sequence[str]) -> tuple[Recipe, list[Problem]]:
    """A recipe for a folder of weights, and what is wrong with it."""
    default = Recipe()
    half = any(tensor.dtype is torch.bfloat16 for tensor in found.tensors.values())
    tokenizer = None if found.tokenizer is None else str(found.tokenizer)
    recipe = replace(
        default,
        name=found.path.resolve().name,
        run_dir=str(found.path),
        model=found.model,
        data=replace(found.data, tokenizer=tokenizer),
        train=replace(
            default.train,
            seq_length=found.seq_length or default.train.seq_length,
            precision=Precision.BF16 if half else Precision.FP32,
        ),
    )
    changed, problems = override_recipe(recipe, overrides)
    return replace(changed, run_dir=str(found.path)), problems
