"""The device and the communication backend. Only this package asks whether there is a GPU."""

from __future__ import annotations

import os
import resource
from functools import cache
from typing import Any

import torch

from megatron_deepstack.errors import LayoutError


def has_gpu() -> bool:
    """Whether CUDA devices are visible to this process."""
    return torch.cuda.is_available()


def num_gpus() -> int:
    """Return the number of CUDA devices that are visible to this process."""
    return torch.cuda.device_count()


def require_devices(num_ranks: int) -> None:
    """Make sure that each of `num_ranks` ranks on this machine can have its own GPU; do nothing without any GPU.

    Raises:
        LayoutError: The machine has GPUs, but fewer than ranks.
    """
    if has_gpu() and num_gpus() < num_ranks:
        raise LayoutError(
            [
                f"parallel: {num_ranks} ranks on this machine take a GPU each, and it shows {num_gpus()}; choose a "
                "layout of fewer ranks or more machines, or put CUDA_VISIBLE_DEVICES= before the command to run on "
                "the CPU"
            ]
        )


def local_device() -> torch.device:
    """Return the device of this rank: `cuda:LOCAL_RANK`, or the CPU if there is no GPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu() else torch.device("cpu")


def select_device() -> torch.device:
    """Make `local_device()` the current device and return it. Call it once per process, before any allocation.

    Raises:
        LayoutError: The machine has GPUs, but not as many as LOCAL_RANK needs.
    """
    device = local_device()
    if device.type == "cuda":
        require_devices(device.index + 1)
        torch.cuda.set_device(device)
    return device


def backend() -> str:
    """Return the `torch.distributed` backend of the device: `nccl` or `gloo`."""
    return "nccl" if has_gpu() else "gloo"


@cache
def side_stream(purpose: str) -> torch.cuda.Stream:
    """Return this process's stream for copies of one kind, which run beside what the device computes.

    Args:
        purpose: What is copied; each purpose has a stream of its own.
    """
    return torch.cuda.Stream(local_device())


def synchronize() -> None:
    """Wait until the device has finished its work; on a CPU return at once. Only clocks need it, never results."""
    if has_gpu():
        torch.cuda.synchronize()


def max_memory_bytes() -> int:
    """Return the peak of allocated device memory; without a GPU, the peak of this process's resident memory."""
    if has_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name() -> str:
    """Return the name of the current GPU, or `cpu` without a GPU."""
    return torch.cuda.get_device_name() if has_gpu() else "cpu"


def compute_capability() -> tuple[int, int]:
    """Return the CUDA compute capability (major, minor) of this rank's GPU, or (0, 0) without a GPU."""
    return torch.cuda.get_device_capability() if has_gpu() else (0, 0)


def cuda_facts() -> dict[str, Any]:
    """Return plain values about torch and its devices, for the command `doctor`.

    Returns:
        A dict with the keys `torch` (version), `cuda` (version that torch was built for, or empty), `nccl` (version, or
        empty) and `devices` (a list of pairs of name and memory in bytes).
    """
    nccl = ""
    if has_gpu() and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    names = [torch.cuda.get_device_name(index) for index in range(num_gpus())]
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "nccl": nccl,
        "devices": [list(pair) for pair in zip(names, gpu_memories(), strict=True)],
    }


def gpu_memories() -> tuple[int, ...]:
    """Return the memory in bytes of each GPU that is visible to this process."""
    return tuple(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))


def device_memory_bytes() -> int | None:
    """Return the memory in bytes of this rank's GPU; None without one."""
    return torch.cuda.get_device_properties(local_device()).total_memory if has_gpu() else None
