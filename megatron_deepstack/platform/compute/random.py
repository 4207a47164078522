"""Saving and restoring the random generator of the device."""

from __future__ import annotations

import torch

from megatron_deepstack.platform.compute.device import has_gpu


def device_random_state() -> torch.Tensor:
    """Return the state of the current GPU's generator, or of the CPU's without a GPU, as uint8 in host memory."""
    return torch.cuda.get_rng_state() if has_gpu() else torch.get_rng_state()


def set_device_random_state(state: torch.Tensor) -> None:
    """Restore a state that `device_random_state` returned on the same kind of device."""
    if has_gpu():
        torch.cuda.set_rng_state(state)
