"""What is read out of a Chrome trace: kernels by time, idle share, calls of the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_deepstack.testing.gpu.traces import Kernel, idle_share, largest_kernels, record, runtime_calls


def event(name: str, begin: float, duration: float, category: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration}


EVENTS = [
    event("gemm", 0, 10),
    event("add", 5, 10),
    event("gemm", 20, 20),
    event("Memcpy HtoD", 25, 5, "gpu_memcpy"),
    event("aten::mm", 0, 1000, "cpu_op"),
    event("cudaLaunchKernel", 0, 1, "cuda_runtime"),
    event("cudaLaunchKernel", 2, 1, "cuda_runtime"),
    event("cudaStreamSynchronize", 3, 1, "cuda_runtime"),
]


def test_kernels_by_their_time_in_all() -> None:
    assert largest_kernels(EVENTS, 2) == [Kernel("gemm", 2, 30), Kernel("add", 1, 10)]


def test_operations_stand_for_kernels_on_a_cpu() -> None:
    assert largest_kernels([event("aten::mm", 0, 3, "cpu_op")], 5) == [Kernel("aten::mm", 1, 3)]


@pytest.mark.parametrize(
    ("events", "share"),
    [
        (EVENTS, 5 / 40),
        ([event("one", 7, 3)], 0.0),
        ([event("long", 0, 10), event("inside", 2, 1), event("late", 15, 5)], 5 / 20),
        ([event("aten::mm", 0, 3, "cpu_op")], None),
    ],
    ids=["overlapping", "one", "nested", "no kernel"],
)
def test_idle_share(events: list[dict[str, Any]], share: float | None) -> None:
    assert idle_share(events) == (None if share is None else pytest.approx(share))


def test_calls_of_the_runtime() -> None:
    assert runtime_calls(EVENTS) == {"cudaLaunchKernel": 2, "cudaStreamSynchronize": 1}


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_of_this_process_is_written_and_read_back(tmp_path: Path, name: str) -> None:
    events = record(lambda: torch.ones(8, 8) @ torch.ones(8, 8), tmp_path / name)
    assert "aten::mm" in {kernel.name for kernel in largest_kernels(events, 100)}
    assert (tmp_path / name).stat().st_size > 0
