"""Host memory for copies: page-locked where that is possible, and usable where it is not."""

from __future__ import annotations

import pytest
import torch

from megatron_deepstack.platform.compute import host_memory
from megatron_deepstack.platform.compute.host_memory import HostMemory, copies_behind_queued_work, lay_out


def copied_through(memory: HostMemory, sources: list[torch.Tensor]) -> bool:
    offsets, num_bytes = lay_out(sources)
    memory.reserve(num_bytes)
    targets = [memory.view(offset, source) for offset, source in zip(offsets, sources, strict=True)]
    copies_behind_queued_work()(list(zip(targets, sources, strict=True)))
    return all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))


def test_memory_grows_and_holds_what_is_copied() -> None:
    memory = HostMemory()
    assert copied_through(memory, [torch.arange(5.0), torch.ones(3, 2, dtype=torch.bfloat16)])
    assert copied_through(memory, [torch.arange(5000), torch.tensor(7.0)])
    assert not memory.is_locked
    memory.close()


def test_refused_page_locking_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU whose system refuses; what was never locked is not unlocked."""
    calls: list[str] = []

    def refuse(_: torch.Tensor) -> None:
        raise RuntimeError("CUDA driver error: operation not supported")

    monkeypatch.setattr(host_memory, "register_pages", refuse)
    monkeypatch.setattr(host_memory, "unregister_pages", lambda _: calls.append("unlock"))
    memory = HostMemory()
    monkeypatch.setattr(host_memory, "has_gpu", lambda: True)
    with pytest.warns(RuntimeWarning, match=r"4096 bytes .* cannot be page-locked \(CUDA driver error.*ulimit -l"):
        memory.reserve(4096)
    monkeypatch.setattr(host_memory, "has_gpu", lambda: False)
    assert copied_through(memory, [torch.arange(10.0)])
    memory.close()
    assert calls == []


def test_locked_memory_is_unlocked_before_it_grows_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(host_memory, "register_pages", lambda tensor: calls.append(("lock", tensor.nbytes)))
    monkeypatch.setattr(host_memory, "unregister_pages", lambda tensor: calls.append(("unlock", tensor.nbytes)))
    monkeypatch.setattr(host_memory, "has_gpu", lambda: True)
    memory = HostMemory()
    memory.reserve(4096)
    memory.reserve(64)
    memory.reserve(8192)
    memory.close()
    assert calls == [("lock", 4096), ("unlock", 4096), ("lock", 8192), ("unlock", 8192)]
