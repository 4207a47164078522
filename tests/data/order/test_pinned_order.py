"""The order of data as numbers, written down once.

A resumed run recomputes the order from seed and step, so an order that changed with a release of this package or of
numpy would silently give it some samples twice and others never. If a test here fails, the order must be brought back,
not the numbers.
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from megatron_deepstack.data.order.sampler import StoreStream, epoch_order, global_batch, mixed_batch

SHORT = {
    (0, 0, 1): [0],
    (0, 0, 12): [9, 2, 7, 4, 5, 11, 0, 3, 6, 10, 8, 1],
    (0, 1, 12): [0, 7, 1, 11, 3, 10, 4, 6, 9, 8, 2, 5],
    (7, 0, 12): [4, 6, 10, 0, 1, 3, 8, 7, 2, 5, 9, 11],
    (7, 2, 10): [1, 5, 3, 4, 6, 9, 0, 8, 2, 7],
    (2**31, 0, 8): [0, 3, 5, 2, 7, 4, 6, 1],
}
"""By seed, epoch and number of samples: the whole permutation."""
LONG = {
    (0, 0, 1000): ([459, 206, 222, 162, 711, 814, 350, 890], 4155787583),
    (3, 5, 100000): ([68514, 70795, 34937, 53020, 96906, 95281, 41510, 75806], 2290367346),
    (0, 0, 1000003): ([672749, 933012, 264558, 79733, 79462, 281370, 604420, 833012], 425774105),
}
"""By seed, epoch and number of samples: the first samples, and the CRC-32 of all of them as little-endian uint32."""


@pytest.mark.parametrize(("case", "order"), SHORT.items(), ids=map(str, SHORT))
def test_short_epochs(case: tuple[int, int, int], order: list[int]) -> None:
    found = epoch_order(*case)
    assert found.dtype == np.uint32
    assert found.tolist() == order


@pytest.mark.parametrize(("case", "order"), LONG.items(), ids=map(str, LONG))
def test_long_epochs(case: tuple[int, int, int], order: tuple[list[int], int]) -> None:
    first, checksum = order
    found = epoch_order(*case)
    assert found.dtype == np.uint32
    assert found[: len(first)].tolist() == first
    assert zlib.crc32(found.astype("<u4").tobytes()) == checksum


def test_a_batch_across_two_epochs() -> None:
    assert global_batch(7, 1, 8, 12).tolist() == [2, 5, 9, 11, *epoch_order(7, 1, 12)[:4]]
    assert global_batch(7, 2, 8, 12).tolist() == [0, 8, 9, 1, 3, 4, 2, 5]


def test_batches_of_a_mixture() -> None:
    stores, numbers = mixed_batch(7, 3, 12, [3, 1])
    assert stores.tolist() == [1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert numbers.tolist() == [9, 34, 11, 30, 27, 31, 10, 29, 32, 33, 35, 28]
    stores, numbers = mixed_batch(0, 0, 8, [0.5, 0.25, 0.25])
    assert stores.tolist() == [0, 1, 1, 0, 2, 0, 2, 0]
    assert numbers.tolist() == [2, 0, 1, 1, 1, 3, 0, 0]


def test_streams_of_the_stores_of_a_mixture() -> None:
    numbers = np.arange(18)
    first = [0, 1, 2, 3, 4, 5, 1, 2, 3, 5, 0, 4, 3, 1, 0, 4, 2, 5]
    second = [2, 5, 4, 1, 3, 0, 1, 3, 2, 0, 5, 4, 0, 2, 4, 1, 3, 5]
    assert StoreStream(7, 0, 6).take(numbers).tolist() == first
    assert StoreStream(7, 1, 6).take(numbers).tolist() == second
