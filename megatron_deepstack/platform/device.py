"""Device and communication backend, chosen once; nothing else asks whether there is a GPU."""

from __future__ import annotations

import os

import torch


def has_gpu() -> bool:
    """Whether CUDA devices are visible to this process."""
    return torch.cuda.is_available()


def local_device() -> torch.device:
    """The device of this rank: `cuda:LOCAL_RANK`, or the CPU where there is no GPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu() else torch.device("cpu")


def select_device() -> torch.device:
    """Make `local_device()` the current one and return it. Call once per process, before any allocation."""
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def backend() -> str:
    """`torch.distributed` backend that fits the device."""
    return "nccl" if has_gpu() else "gloo"


def synchronize() -> None:
    """Wait for the device; at once on a CPU. For clocks, never for correctness."""
    if has_gpu():
        torch.cuda.synchronize()


def max_memory_bytes() -> int:
    """Most device memory allocated so far; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if has_gpu() else 0
