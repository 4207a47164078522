"""Opening the data of a run: every store is checked once on each machine, and known to its other ranks.

Checking reads the index arrays of the whole store, so one rank of a machine does it, and the others open what it found
to be right.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.images.processor import check_store
from megatron_deepstack.data.order.mixture import Mixture, Samples
from megatron_deepstack.data.order.steps import Share, StepReader
from megatron_deepstack.data.store.lengths import check_lengths
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.url.cache import CacheConfig
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import ConfigError, DataError

OpenStore = Callable[[Recipe, str | None], Store]
"""From a recipe and a path of its data section to the open store: `checked_store` or `known_store`."""


def checked_store(recipe: Recipe, path: str | None) -> Store:
    """Open a store after checking that it fits the recipe: tokenizer, processor, lengths of all samples.

    Args:
        recipe: The run's recipe.
        path: Folder or URL; None where the recipe names none.

    Returns:
        The open store.

    Raises:
        ConfigError: No path.
        StoreError: The store is unusable or made for something else.
        DataError: It is empty, a sample is too long, or the tokenizer cannot be read.
    """
    store = known_store(recipe, path)
    check_store(store, recipe.model, load_tokenizer(recipe.data.tokenizer) if recipe.data.tokenizer else None)
    check_lengths(store, recipe.model, recipe.train)
    if len(store) == 0:
        raise DataError(f"{path}: the store holds no samples; preprocess records whose images can be read")
    return store


def known_store(recipe: Recipe, path: str | None) -> Store:
    """Open a store that another process of this machine has checked.

    Args:
        recipe: The run's recipe.
        path: Folder or URL; None where the recipe names none.

    Returns:
        The open store.

    Raises:
        ConfigError: No path.
        StoreError: The store is missing or unfinished.
    """
    if path is None:
        raise ConfigError(["data.store: not set; give the folder that `preprocess` wrote"])
    data = recipe.data
    return Store.open(path, verify_checksums=data.verify_checksums, cache=CacheConfig.of(data))


def open_training_reader(recipe: Recipe, share: Share, open_store: OpenStore = checked_store) -> StepReader:
    """Open the recipe's training data, one store or a mixture, for one rank.

    Args:
        recipe: The run's recipe.
        share: The part that this rank reads.
        open_store: How each store is opened.

    Returns:
        The reader.

    Raises:
        ConfigError: The recipe names no store.
        DeepStackError: As `open_store` does.
    """
    data = recipe.data
    if data.stores is None:
        samples: Samples = open_store(recipe, data.store)
    else:
        samples = Mixture([open_store(recipe, path) for path in data.stores], data.weights)
    return StepReader(samples, recipe.model, recipe.parallel, recipe.train, share, data.unreadable)


def open_reader(recipe: Recipe, path: str | None, share: Share, open_store: OpenStore = checked_store) -> StepReader:
    """Open the one store at `path` for one rank. It stops at anything that cannot be read, as nobody skips its samples.

    Args:
        recipe: The run's recipe.
        path: Folder or URL; None if the recipe names none.
        share: The part that this rank reads.
        open_store: How the store is opened.

    Returns:
        The reader.

    Raises:
        DeepStackError: As `open_store` does.
    """
    return StepReader(open_store(recipe, path), recipe.model, recipe.parallel, recipe.train, share)
