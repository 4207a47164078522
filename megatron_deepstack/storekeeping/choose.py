"""What a verb works on: a store, the model that is assumed to read it, its tokenizer, and some of its samples."""

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
    """Open a store, with the model that is assumed to read it.

    Args:
        path: Folder or URL of the store.
        recipe: A recipe's file or name, or a run; None takes the model that the store's views were made for.

    Returns:
        The store and the model.

    Raises:
        ConfigError: The recipe has a fault.
        StoreError: The store is unusable or does not fit the recipe.
    """
    store = Store.open(path)
    return store, model_for(store, None if recipe is None else _recipe(recipe).model)


def _recipe(text: str) -> Recipe:
    """The recipe of a file or name, or of a run: its folder, or the recipe.yaml in it."""
    folder = Path(text) if Path(text).is_dir() else Path(text).parent
    if (folder / RECIPE_FILE).is_file() and Path(text) in (folder, folder / RECIPE_FILE):
        return recipe_of_run(folder)
    return load_checked_recipe(text)


def tokenizer_for(store: Store, path: str | None, recipe: str | None) -> Tokenizer | None:
    """The tokenizer of a store.

    Args:
        store: The store.
        path: Where the tokenizer is; None takes the recipe's.
        recipe: A recipe's file or name, or a run, or None.

    Returns:
        The tokenizer; None if neither names one.

    Raises:
        DataError: It is not the tokenizer that the store was made with.
    """
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
    """Choose samples.

    Args:
        store: The store.
        asked: Numbers of samples; none or an empty list draws them at random.
        number: How many are drawn.
        seed: Which ones are drawn.

    Returns:
        The numbers as asked for, or the drawn ones in ascending order.

    Raises:
        ConfigError: There is no sample with such a number.
    """
    if not asked:
        drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(store))[:number]
        return sorted(drawn.tolist())
    wrong = [index for index in asked if index >= len(store)]
    if wrong:
        raise ConfigError([f"--sample: {wrong[0]} was asked for; {store.name} has samples 0 to {len(store) - 1}"])
    return list(asked)
