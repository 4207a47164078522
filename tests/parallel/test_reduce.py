"""Sums over replicas: FLOPs of a large step pass the range of 64-bit whole numbers."""

from __future__ import annotations

import pytest
import torch

from megatron_deepstack.parallel import reduce


def test_the_flops_of_two_large_replicas_stay_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 70B model on 6,000 sequences of 4,096 tokens takes 1.05e19 FLOPs; whole numbers of 64 bits end at 9.2e18."""

    def double(tensor: torch.Tensor, group: object) -> None:
        tensor.mul_(2)

    monkeypatch.setattr(reduce.dist, "all_reduce", double)
    monkeypatch.setattr(reduce.parallel_state, "get_data_parallel_group", lambda: None)
    counts = 2**52 + 1  # what float64 holds exactly
    assert reduce.sum_over_replicas([counts, 7e18, 1.05e19]) == [2 * counts, 1.4e19, 2.1e19]
