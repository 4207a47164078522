"""Ranges of flattened tensors as boxes: each element once, in order, in few boxes."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_deepstack.checkpoint.content.boxes import Box, boxes


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 6), (4, 1), (3, 4, 5), (2, 1, 3, 2)], ids=str)
def test_every_range_is_covered_in_order(shape: tuple[int, ...]) -> None:
    whole = np.arange(np.prod(shape)).reshape(shape)
    for start in range(whole.size + 1):
        for stop in range(start, whole.size + 1):
            found = list(boxes(shape, start, stop))
            parts = [
                whole[tuple(slice(o, o + s) for o, s in zip(b.offset, b.shape, strict=True))].ravel() for b in found
            ]
            assert np.concatenate([np.empty(0, int), *parts]).tolist() == list(range(start, stop))
            assert [len(part) for part in parts] == [box.numel for box in found]
            assert len(found) <= 2 * len(shape) - 1


def test_a_scalar_and_nothing() -> None:
    assert list(boxes((), 0, 1)) == [Box((), ())]
    assert list(boxes((), 0, 0)) == []
    assert list(boxes((3, 4), 5, 5)) == []
    assert list(boxes((3, 4), 9, 2)) == []
