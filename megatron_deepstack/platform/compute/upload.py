"""Uploads to the device that never make the host wait: many small arrays travel as one, from page-locked memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from megatron_deepstack.platform.compute.device import local_device


def upload(host: torch.Tensor) -> torch.Tensor:
    """A host tensor on this rank's device; the tensor itself where it is there already, as on a CPU.

    The page-locked copy comes from torch's cache of such memory, which keeps it until the transfer is over.
    """
    device = local_device()
    return host if host.device == device else host.pin_memory().to(device, non_blocking=True)


def upload_all(arrays: Sequence[npt.NDArray]) -> list[torch.Tensor]:
    """Arrays of any shapes on this rank's device, in one transfer.

    Args:
        arrays: Whole numbers; none, or empty ones, are allowed.

    Returns:
        int64 tensors of the same shapes and numbers in the same order, which share one storage.
    """
    if not arrays:
        return []
    together = upload(torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays], dtype=np.int64)))
    parts = together.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
