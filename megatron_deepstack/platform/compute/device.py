"""Device and communication backend, chosen once; nothing else asks whether there is a GPU."""

from __future__ import annotations

import os
import resource
from typing import Any

import torch

from megatron_deepstack.errors import LayoutError


def has_gpu() -> bool:
    """Whether CUDA devices are visible to this process."""
    return torch.cuda.is_available()


def num_gpus() -> int:
    """CUDA devices that are visible to this process."""
    return torch.cuda.device_count()


def require_devices(num_ranks: int) -> None:
    """Raise LayoutError where this machine has GPUs, but fewer than ranks: each takes one for itself."""
    if has_gpu() and num_gpus() < num_ranks:
        raise LayoutError(
            [
                f"parallel: {num_ranks} ranks on this machine take a GPU each, and it shows {num_gpus()}; choose a "
                "layout of fewer ranks or more machines, or put CUDA_VISIBLE_DEVICES= before the command to run on "
                "the CPU"
            ]
        )


def local_device() -> torch.device:
    """The device of this rank: `cuda:LOCAL_RANK`, or the CPU where there is no GPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu() else torch.device("cpu")


def select_device() -> torch.device:
    """Make `local_device()` the current one and return it. Call once per process, before any allocation.

    Raises LayoutError where the machine has no such GPU.
    """
    device = local_device()
    if device.type == "cuda":
        require_devices(device.index + 1)
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
    """Most device memory allocated so far; without a GPU the most memory of this process that was resident."""
    if has_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name() -> str:
    """What the device calls itself, `cpu` without a GPU."""
    return torch.cuda.get_device_name() if has_gpu() else "cpu"


def compute_capability() -> tuple[int, int]:
    """CUDA's (major, minor) of this rank's GPU; (0, 0) without one."""
    return torch.cuda.get_device_capability() if has_gpu() else (0, 0)


def cuda_facts() -> dict[str, Any]:
    """Plain values about torch and its devices, for `doctor`.

    Keys: `torch` (version), `cuda` (version that torch was built for, or empty), `nccl` (version, or empty), `devices`
    (a list of name and bytes of memory).
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
    """Bytes of memory of each GPU that this process sees."""
    return tuple(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
