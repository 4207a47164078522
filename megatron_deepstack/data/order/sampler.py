"""The order of training data: a pure function of (seed, epoch, position), with no state to save except the step.

The endless stream of samples is one epoch after another, each with its own permutation. Step t of a run takes the next
`global_batch_size` samples, whatever the number of ranks; `planning.batch.dealing` divides them among replicas.

A mixture has one such stream for each of its stores, merged by weight: the store's j-th sample (from 0) is due at time
(j + 1/2) / weight, and the merged stream is ordered by due time (Webster's method of apportionment). So after any
number of steps each store has given its share of all samples, with a difference of a few samples at most, whatever the
weights. Within a step the order is shuffled, so that a replica does not always meet the same store.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Order = npt.NDArray[np.uint32] | npt.NDArray[np.int64]
"""A permutation; it takes 4 bytes for each sample, or 8 if there are more than 2**32 samples."""


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> Order:
    """The permutation of an epoch; those of the last two epochs are kept.

    Args:
        seed: The run's seed.
        epoch: 0-based.
        num_samples: Samples of the store.

    Returns:
        (num_samples,), read-only: the samples in the epoch's order, of type `Order`.
    """
    return _permutation((seed, epoch), num_samples)


def global_batch(seed: int, step: int, batch_size: int, num_samples: int) -> Indices:
    """Samples of one step of a run that reads one store.

    Args:
        seed: The run's seed.
        step: 0-based.
        batch_size: Samples of a step over all replicas.
        num_samples: Samples of the store.

    Returns:
        int64 (batch_size,) store indices; a batch may end one epoch and begin the next.
    """
    positions = step * batch_size + np.arange(batch_size)
    epochs, places = np.divmod(positions, num_samples)
    out = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = epoch_order(seed, int(epoch), num_samples)[places[here]]
    return out


def merged_streams(weights: Sequence[float], first: int, stop: int) -> tuple[Indices, Indices]:
    """Positions `first` to `stop - 1` of the merged stream of a mixture.

    Args:
        weights: One positive number for each store, in any unit.
        first: 0-based position.
        stop: The position after the last one.

    Returns:
        Two arrays, int64 (stop - first,): the store of each position, and the number in that store's stream.
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    # Before time t a store has given t * share samples (at most 1 more or less), and all of them together have given t
    # (at most as many more or less as there are stores).
    begin, end = first - len(shares) - 1, stop + len(shares) + 1
    before = np.maximum(np.floor(begin * shares).astype(np.int64), 0)
    counts = np.ceil(end * shares).astype(np.int64) + 1 - before
    store = np.repeat(np.arange(len(shares)), counts)
    number = np.concatenate([start + np.arange(count) for start, count in zip(before, counts, strict=True)])
    order = np.lexsort([store, (number + 0.5) / shares[store]])[first - before.sum() : stop - before.sum()]
    return store[order], number[order]


def mixed_batch(seed: int, step: int, batch_size: int, weights: Sequence[float]) -> tuple[Indices, Indices]:
    """One step of a mixture, shuffled.

    Args:
        seed: The run's seed.
        step: 0-based.
        batch_size: Samples of a step over all replicas.
        weights: One positive number for each store, in any unit.

    Returns:
        Two arrays, int64 (batch_size,): the store of each sample, and its number in that store's stream.
    """
    stores, numbers = merged_streams(weights, step * batch_size, (step + 1) * batch_size)
    order = _permutation((seed, step, _WITHIN_STEP), batch_size)
    return stores[order], numbers[order]


_WITHIN_STEP = 1
"""Third number of the seed for orders within a step; for a store's epochs it is `_STORE`, then the store's number."""
_STORE = 2


class StoreStream:
    """The endless stream of one store of a mixture: epoch after epoch, each with its own permutation.

    Safe in threads: a call works only with the permutations that it found or made itself.
    """

    def __init__(self, seed: int, store: int, num_samples: int) -> None:
        self._key, self._num_samples = (seed, store), num_samples
        self._epochs: dict[int, Order] = {}

    def take(self, numbers: Indices) -> Indices:
        """The samples at some positions of the stream.

        Args:
            numbers: int64 (N,) positions, 0 or more. The permutations of their epochs are kept for the next call, and
                no others.

        Returns:
            int64 (N,) samples of the store.
        """
        epochs, places = np.divmod(numbers, self._num_samples)
        known = self._epochs
        orders = {epoch: known[epoch] if epoch in known else self._order(epoch) for epoch in np.unique(epochs).tolist()}
        self._epochs = orders
        out = np.empty(len(numbers), np.int64)
        for epoch, order in orders.items():
            here = epochs == epoch
            out[here] = order[places[here]]
        return out

    def _order(self, epoch: int) -> Order:
        seed, store = self._key
        return _permutation((seed, epoch, _STORE, store), self._num_samples)


def _permutation(key: Sequence[int], length: int) -> Order:
    """The numbers below `length`, shuffled; the order does not depend on the type that holds them."""
    order: Order = np.arange(length, dtype=np.uint32) if length <= 2**32 else np.arange(length, dtype=np.int64)
    np.random.Generator(np.random.PCG64(list(key))).shuffle(order)
    order.setflags(write=False)
    return order
