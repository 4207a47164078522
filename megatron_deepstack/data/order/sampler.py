"""The order of training data: a pure function of (seed, epoch, position), with no state to save but the step.

The endless stream of samples is epoch after epoch, each a permutation of its own. Step t of a run takes the next
`global_batch_size` of them, whatever the number of ranks; replicas then share a batch out among themselves.

A mixture is such a stream for each of its stores, merged by weight: the store's j-th sample (from 0) is due at time
(j + 1/2) / weight, and the merged stream goes by due time (Webster's method of apportionment). So after any number of
steps each store has given its share of all samples to within a few, whatever the weights; within a step the order is
shuffled, lest a replica always meet the same store.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Order = npt.NDArray[np.uint32] | npt.NDArray[np.int64]
"""A permutation: 4 bytes a sample, 8 where there are more than 2**32."""


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> Order:
    """The permutation of an epoch, (num_samples,), read-only."""
    return _permutation((seed, epoch), num_samples)


def global_batch(seed: int, step: int, batch_size: int, num_samples: int) -> Indices:
    """Samples of 0-based step `step`, (batch_size,); a batch may end one epoch and begin the next."""
    positions = step * batch_size + np.arange(batch_size)
    epochs, places = np.divmod(positions, num_samples)
    out = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = epoch_order(seed, int(epoch), num_samples)[places[here]]
    return out


def merged_streams(weights: Sequence[float], first: int, stop: int) -> tuple[Indices, Indices]:
    """Positions `first` to `stop - 1` of the merged stream: the store of each, and its number in that store's stream.

    Weights are positive, in any unit.
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    # Before time t a store has given t * share samples, to within 1; all of them together t, to within their number.
    begin, end = first - len(shares) - 1, stop + len(shares) + 1
    before = np.maximum(np.floor(begin * shares).astype(np.int64), 0)
    counts = np.ceil(end * shares).astype(np.int64) + 1 - before
    store = np.repeat(np.arange(len(shares)), counts)
    number = np.concatenate([start + np.arange(count) for start, count in zip(before, counts, strict=True)])
    order = np.lexsort([store, (number + 0.5) / shares[store]])[first - before.sum() : stop - before.sum()]
    return store[order], number[order]


def mixed_batch(seed: int, step: int, batch_size: int, weights: Sequence[float]) -> tuple[Indices, Indices]:
    """0-based step `step` of a mixture: the store of each sample and its number in that store's stream, shuffled."""
    stores, numbers = merged_streams(weights, step * batch_size, (step + 1) * batch_size)
    order = _permutation((seed, step, _WITHIN_STEP), batch_size)
    return stores[order], numbers[order]


_WITHIN_STEP = 1
"""Third number of the seed of orders within a step; those of a store's epochs have `_STORE` and the store's number."""
_STORE = 2


class StoreStream:
    """The endless stream of one of a mixture's stores: epoch after epoch, each a permutation of its own.

    Safe in threads: a call works on the permutations that it found or made, whatever others keep meanwhile.
    """

    def __init__(self, seed: int, store: int, num_samples: int) -> None:
        self._key, self._num_samples = (seed, store), num_samples
        self._epochs: dict[int, Order] = {}

    def take(self, numbers: Indices) -> Indices:
        """The samples at positions `numbers` of the stream.

        Args:
            numbers: int64 (N,), 0 or more. The permutations of their epochs are kept for the next call, others not.

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
    """Shuffled numbers below `length`; which type holds them does not change their order."""
    order: Order = np.arange(length, dtype=np.uint32) if length <= 2**32 else np.arange(length, dtype=np.int64)
    np.random.Generator(np.random.PCG64(list(key))).shuffle(order)
    order.setflags(write=False)
    return order


def share_of_replica(batch: Indices, dp: int, num_replicas: int, micro_batch_size: int) -> Indices:
    """Replica `dp`'s samples of a global batch, (micro-batches, micro_batch_size)."""
    return batch.reshape(-1, num_replicas, micro_batch_size)[:, dp]
