"""Lengths of a store's samples with their images opened up, from the index arrays alone."""

from __future__ import annotations

import numpy as np

from megatron_deepstack.config.schema import ModelConfig, TrainConfig
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.rows import context_length

_LISTED = 10
"""Samples named in an error."""


def expanded_lengths(store: Store, model: ModelConfig) -> np.ndarray:
    """int64 (samples,): tokens of each sample as `model` sees it, visual ones included."""
    images, ends = store.array("samples/images"), store.array("samples/images_offsets")
    grids, which = np.unique(store.array("images/grid")[images], axis=0, return_inverse=True)
    contexts = np.array([context_length(model, (int(gw), int(gh))) for gw, gh in grids], np.int64)
    # A placeholder is one token already; the sum over a sample's images is a difference of running sums.
    running = (
        np.concatenate([[0], np.cumsum(contexts[which.reshape(-1)] - 1)]) if len(images) else np.zeros(1, np.int64)
    )
    lengths: np.ndarray = store.lengths() + running[ends[1:]] - running[ends[:-1]]
    return lengths


def check_lengths(store: Store, model: ModelConfig, train: TrainConfig) -> None:
    """Raise DataError, naming the first ten, if samples exceed `train.seq_length` and may not be cut."""
    if train.truncate:
        return
    lengths = expanded_lengths(store, model)
    too_long = np.flatnonzero(lengths > train.seq_length)
    if len(too_long):
        listed = "\n".join(f"  {store.sample(int(i)).id}: {lengths[i]} tokens" for i in too_long[:_LISTED])
        raise DataError(
            f"{store.name}: {len(too_long)} of {len(store)} samples exceed train.seq_length {train.seq_length}, visual "
            f"tokens included (longest {lengths.max()}); raise it, or set train.truncate=true:\n{listed}"
        )
