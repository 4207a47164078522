"""What a verb looks at: a store, the model it is looked at with, its tokenizer, and some of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_deepstack.config.run_folder import RECIPE_FILE
from megatron_deepstack.config.schema import ModelConfig, Recipe
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import ConfigError, DataError
from megatron_deepstack.planning.check import load_checked_recipe
from megatron_deepstack.run_folder.recipe import recipe_of_run
from megatron_deepstack.storekeeping.model import model_for


def load(path: str, recipe: str | None) -> tuple[Store, ModelConfig]:
    """Open a store, and the model it is looked at with: a recipe's, or the one its views were made for.

    Raises ConfigError for the recipe, StoreError where the store is unusable or does not fit it.
    """
    store = Store.open(path)
    return store, model_for(store, None if recipe is None else _recipe(recipe).model)


def _recipe(text: str) -> Recipe:
    """A recipe's file or name, or a run: its folder, or the recipe.yaml in it."""
    folder = Path(text) if Path(text).is_dir() else Path(text).parent
    if (folder / RECIPE_FILE).is_file() and Path(text) in (folder, folder / RECIPE_FILE):
        return recipe_of_run(folder)
    return load_checked_recipe(text)


def tokenizer_for(store: Store, path: str | None, recipe: str | None) -> Tokenizer | None:
    """The tokenizer at `path`, or the recipe's; None without either. Raises DataError if it is not the store's."""
    source = path or (_recipe(recipe).data.tokenizer if recipe is not None else None)
    if source is None:
        return None
    found = load_tokenizer(source)
    if found.fingerprint != store.tokenizer_sha256:
        raise DataError(
            f"{source}: not the tokenizer of {store.name}: its sha256 is {found.fingerprint[:12]}..., the store's "
            f"{store.tokenizer_sha256[:12]}...; give the one it was preprocessed with"
        )
    return found


def chosen(store: Store, asked: Sequence[int] | None, number: int, seed: int) -> list[int]:
    """The samples asked for, or `number` of them drawn at random, in the order of the store."""
    if not asked:
        drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(store))[:number]
        return sorted(drawn.tolist())
    wrong = [index for index in asked if index >= len(store)]
    if wrong:
        raise ConfigError([f"--sample: {wrong[0]} was asked for; {store.name} has samples 0 to {len(store) - 1}"])
    return list(asked)
