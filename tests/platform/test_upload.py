"""Uploads: many tensors as one transfer, whatever their shapes and dtypes."""

from __future__ import annotations

import threading

import torch

from megatron_deepstack.platform.compute.upload import Upload


def tensors() -> list[torch.Tensor]:
    return [
        torch.arange(7, dtype=torch.uint8).view(7, 1),
        torch.arange(6, dtype=torch.int64).view(2, 3) - 3,
        torch.zeros(0, 4, dtype=torch.int64),
        torch.tensor(2.5),
        torch.linspace(-1, 1, 9, dtype=torch.bfloat16)[::2],
    ]


def test_what_arrives_is_what_was_sent() -> None:
    sent = tensors()
    for arrived, tensor in zip(Upload(sent).take(), sent, strict=True):
        assert (arrived.dtype, arrived.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(arrived, tensor)
    assert Upload([]).take() == []


def test_all_share_one_storage_and_none_with_the_source() -> None:
    sent = tensors()
    arrived = Upload(sent).take()
    sent[1].fill_(100)
    assert torch.equal(arrived[1], tensors()[1])
    assert len({tensor.untyped_storage().data_ptr() for tensor in arrived}) == 1
    assert all(tensor.data_ptr() % 64 == 0 for tensor in arrived if tensor.numel())


def test_another_thread_may_begin() -> None:
    begun: list[Upload] = []
    thread = threading.Thread(target=lambda: begun.append(Upload(tensors())))
    thread.start()
    thread.join()
    assert all(torch.equal(one, other) for one, other in zip(begun[0].take(), tensors(), strict=True))
