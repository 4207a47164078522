"""The order of training data: a pure function of (seed, epoch, position), with no state to save but the step.

The endless stream of samples is epoch after epoch, each a permutation of its own. Step t of a run takes the next
`global_batch_size` of them, whatever the number of ranks; replicas then share a batch out among themselves.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> Indices:
    """The permutation of an epoch, (num_samples,)."""
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)
    order.setflags(write=False)
    return order


def global_batch(seed: int, step: int, batch_size: int, num_samples: int) -> Indices:
    """Samples of 0-based step `step`, (batch_size,); a batch may end one epoch and begin the next."""
    positions = step * batch_size + np.arange(batch_size)
    epochs, places = np.divmod(positions, num_samples)
    out = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = epoch_order(seed, int(epoch), num_samples)[places[here]]
    return out


def share_of_replica(batch: Indices, dp: int, num_replicas: int, micro_batch_size: int) -> Indices:
    """Replica `dp`'s samples of a global batch, (micro-batches, micro_batch_size)."""
    return batch.reshape(-1, num_replicas, micro_batch_size)[:, dp]
