"""Lengths of a store's samples with their images expanded, from the index arrays alone.

Every rank reads the lengths of all samples when it starts. So nothing is sorted, and samples are handled piece by
piece, so that memory does not grow with them: checking 5M samples of one image each took 0.15 s of CPU time, with
arrays of at most 50 MB (measured on a made-up index that was in the page cache).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from megatron_deepstack.config.schema import ModelConfig, TrainConfig
from megatron_deepstack.config.sizes import resampled_side
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import MIXED_VERSION
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.exchange.image_plan import image_plan
from megatron_deepstack.planning.exchange.rows import context_length
from megatron_deepstack.planning.views import Grid, TileGrid, ViewLayout

_LISTED: Final = 10
"""Samples named in an error."""
_PIECE: Final = 1 << 20
"""Samples handled together."""
_COUNTED: Final = 1 << 20
"""Grid numbers below this are counted, larger ones are sorted. Grids of recipes have a few crops."""


def expanded_lengths(store: Store, model: ModelConfig) -> np.ndarray:
    """Tokens of each sample as `model` receives it, with visual tokens.

    Args:
        store: The store.
        model: Determines how many tokens an image takes.

    Returns:
        int64 (samples,).
    """
    return np.concatenate([np.empty(0, np.int64), *(lengths for _, lengths in _pieces(store, model))])


def check_lengths(store: Store, model: ModelConfig, train: TrainConfig) -> None:
    """Check that all samples fit `train.seq_length`, unless they may be cut (`train.truncate`).

    Args:
        store: The store.
        model: Determines how many tokens an image takes.
        train: Gives `seq_length` and `truncate`.

    Raises:
        DataError: Some samples are too long; the message names the first ten.
    """
    if train.truncate:
        return
    first_ones: list[tuple[int, int]] = []
    count = longest = 0
    for first, lengths in _pieces(store, model):
        too_long = np.flatnonzero(lengths > train.seq_length)
        first_ones += [(first + int(i), int(lengths[i])) for i in too_long[: _LISTED - len(first_ones)]]
        count, longest = count + len(too_long), max(longest, int(lengths.max(initial=0)))
    if count:
        listed = "\n".join(f"  {store.sample(index).id}: {length} tokens" for index, length in first_ones)
        raise DataError(
            f"{store.name}: {count} of {len(store)} samples exceed train.seq_length {train.seq_length}, visual "
            f"tokens included (longest {longest}); raise it, or set train.truncate=true:\n{listed}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class SampleSizes:
    """Sizes of some samples; arrays are int64 (N,)."""

    lengths: npt.NDArray[np.int64]
    """Tokens, with visual tokens."""
    units: npt.NDArray[np.int64]
    """Work for the encoder: units, or visual tokens where views have any size."""
    visual: npt.NDArray[np.int64]
    """Visual tokens, which are the positions to which rows are added."""


def sample_sizes(store: Store, model: ModelConfig, samples: npt.NDArray[np.integer]) -> SampleSizes:
    """Sizes of chosen samples, from the index arrays alone.

    Args:
        store: The store.
        model: Determines how many tokens an image takes, and what the encoder does for it.
        samples: Integers (N,), numbers of samples.

    Returns:
        The sizes.
    """
    offsets = store.rows("samples/tokens_offsets")
    tokens = offsets.take(samples + 1) - offsets.take(samples)
    owner, images = _images_of(store, samples)
    work = _visual_tokens(store, images, model), _encoder_work(store, images, model)
    visual, encoded = (np.bincount(owner, weights, len(samples)).astype(np.int64) for weights in work)
    return SampleSizes(tokens - np.bincount(owner, minlength=len(samples)) + visual, encoded, visual)


def sample_views(store: Store, samples: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """The views of any size of chosen samples, from the index arrays alone.

    Args:
        store: A store of such views.
        samples: Integers (N,), numbers of samples.

    Returns:
        int64 (I, 4), a row for each view: the place in `samples` of the sample that has it, and its patches in time,
        from top to bottom, and from left to right.
    """
    owner, images = _images_of(store, samples)
    return np.column_stack([owner, store.rows("images/grid_thw").take(images).astype(np.int64).reshape(-1, 3)])


def _images_of(store: Store, samples: npt.NDArray[np.integer]) -> tuple[np.ndarray, np.ndarray]:
    """The images of chosen samples: the place in `samples` of the sample that has each, and its number."""
    ends = store.rows("samples/images_offsets")
    first = ends.take(samples)
    counts = ends.take(samples + 1) - first
    owner = np.repeat(np.arange(len(samples)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owner, store.rows("samples/images").take(first[owner] + within)


def _pieces(store: Store, model: ModelConfig) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of the store: the number of the first sample, and the lengths of it and of those that follow."""
    for first in range(0, len(store), _PIECE):
        stop = min(first + _PIECE, len(store))
        tokens = np.diff(store.rows("samples/tokens_offsets")[first : stop + 1])
        ends = store.rows("samples/images_offsets")[first : stop + 1]
        images = store.rows("samples/images")[int(ends[0]) : int(ends[-1])]
        # A placeholder is one token already; the sum over a sample's images is a difference of running sums.
        running = np.zeros(len(images) + 1, np.int64)
        np.cumsum(_visual_tokens(store, images, model) - 1, out=running[1:])
        yield first, tokens + running[ends[1:] - ends[0]] - running[ends[:-1] - ends[0]]


def _visual_tokens(store: Store, images: np.ndarray, model: ModelConfig) -> np.ndarray:
    """The tokens that each of these images takes in the context: int64 (N,)."""
    if store.version == MIXED_VERSION:
        patches = store.rows("images/grid_thw").take(images).astype(np.int64)
        found: np.ndarray = patches.prod(axis=1) // int(store.attributes.processor["merge_size"]) ** 2
        return found
    if store.layout is ViewLayout.TILES:
        return _by_tiles(store, images, lambda tiles: context_length(model, tiles))
    return _by_grid(store.rows("images/grid").take(images), lambda grid: context_length(model, grid))


def _encoder_work(store: Store, images: np.ndarray, model: ModelConfig) -> np.ndarray:
    """What each of these images costs the encoder, int64 (N,): units, or tokens where views have any size."""
    if store.version == MIXED_VERSION:
        return _visual_tokens(store, images, model)
    if store.layout is ViewLayout.TILES:
        return _by_tiles(store, images, lambda tiles: tiles.num_used_views(resampled_side(model)))
    grids = store.rows("images/grid").take(images)
    return _by_grid(grids, lambda grid: len(image_plan(model, grid, context_length(model, grid)).units))


def _by_tiles(store: Store, images: np.ndarray, number_of: Callable[[TileGrid], int]) -> np.ndarray:
    """A number of the tiles of each of these images, found once for each different size: int64 (N,)."""
    grids, sizes = (store.rows(f"images/{name}").take(images).astype(np.int64) for name in ("grid", "size"))
    found, places = np.unique(np.concatenate([grids, sizes], axis=1), axis=0, return_inverse=True)
    numbers = [number_of(TileGrid(*row)) if row[0] else 0 for row in found.tolist()]
    return np.array(numbers, np.int64)[places.reshape(-1)]


def _by_grid(grids: np.ndarray, number_of: Callable[[Grid], int]) -> np.ndarray:
    """A number of each of these grids, (N, 2), found once for each different grid: int64 (N,)."""
    if not len(grids):
        return np.zeros(0, np.int64)
    columns = int(grids[:, 0].max()) + 1
    number = grids[:, 1].astype(np.int64) * columns + grids[:, 0]
    counted = number.max() < _COUNTED
    found = np.flatnonzero(np.bincount(number)) if counted else np.unique(number)
    numbers = [number_of((int(one % columns), int(one // columns))) for one in found]
    if counted:
        table = np.zeros(int(found[-1]) + 1, np.int64)
        table[found] = numbers
        return table[number]
    return np.array(numbers, np.int64)[np.searchsorted(found, number)]
