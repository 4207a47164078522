"""The order of data: every sample once an epoch, the same for any number of ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_deepstack.data.order.sampler import epoch_order, global_batch


@given(num_samples=st.integers(1, 50), batch=st.integers(1, 20), seed=st.integers(0, 5))
def test_every_sample_once_an_epoch(num_samples: int, batch: int, seed: int) -> None:
    stream = np.concatenate([global_batch(seed, step, batch, num_samples) for step in range(3 * num_samples)])
    for epoch in range(3):
        part = stream[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(part) == list(range(num_samples))


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch_order(seed, epoch, 100).tolist() for seed in range(2) for epoch in range(2)]
    assert len({tuple(order) for order in orders}) == 4
