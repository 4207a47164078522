"""Copies beside what the device computes: pieces join on the way to the device, and split on the way back."""

from __future__ import annotations

import torch

from megatron_deepstack.platform.compute.side_copies import Drained, Fetched


def test_pieces_join_in_memory_of_their_own() -> None:
    pieces = [torch.randn(5, 3), torch.randn(5, 1), torch.randn(5, 4)]
    for given in (pieces, pieces[:1], [torch.empty(0, 3)]):
        whole = Fetched(given).take()
        assert torch.equal(whole, torch.cat(given, dim=-1))
        if len(whole):
            whole.zero_()
            assert given[0].any(), "what is fetched may be overwritten, and the host's copy stays"


def test_a_tensor_splits_into_its_targets() -> None:
    source = torch.randn(4, 6, dtype=torch.bfloat16)
    targets = [torch.zeros(4, width, dtype=torch.bfloat16) for width in (2, 3, 1)]
    copy = Drained(source, targets)
    copy.release()
    copy.release()
    assert torch.equal(torch.cat(targets, dim=-1), source)


def test_there_and_back_is_the_same() -> None:
    host = torch.arange(24.0).view(4, 6)
    windows = [host[:, :2].contiguous(), host[:, 2:].contiguous()]
    fetched = Fetched([one[1:3] for one in windows]).take()
    Drained(2 * fetched, [one[1:3] for one in windows]).release()
    expected = host.clone()
    expected[1:3] *= 2
    assert torch.equal(torch.cat(windows, dim=-1), expected)
