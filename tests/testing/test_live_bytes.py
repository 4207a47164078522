"""The count of bytes alive at once: views once, what is freed no more, backward included."""

from __future__ import annotations

import torch

from megatron_deepstack.testing.live_bytes import LiveBytes


def test_views_count_once_and_the_peak_stays() -> None:
    with LiveBytes(lambda tensor: tensor.dim() == 2) as live:
        first = torch.zeros(4, 8)
        view = first[1:].t()
        assert live.now == 4 * 8 * 4
        second = first + 1
        assert live.now == 2 * 4 * 8 * 4
        del second
        assert live.now == 4 * 8 * 4
        first.untyped_storage().resize_(0)
        assert live.now == 0
        assert view.shape == (8, 3)
    assert live.peak == 2 * 4 * 8 * 4


def test_what_backward_makes_is_counted() -> None:
    weights = torch.ones(4, 8, requires_grad=True)
    with LiveBytes(lambda tensor: tensor.dim() == 2) as live:
        (weights * 2).sum().backward()
        assert weights.grad is not None
        assert live.now == weights.grad.nbytes
