"""The device's random generator."""

from __future__ import annotations

import torch

from megatron_deepstack.platform.compute.device import has_gpu


def device_random_state() -> torch.Tensor:
    """State of the current device's generator, uint8 on the host; the host's own where there is no GPU."""
    return torch.cuda.get_rng_state() if has_gpu() else torch.get_rng_state()


def set_device_random_state(state: torch.Tensor) -> None:
    """Put it back."""
    if has_gpu():
        torch.cuda.set_rng_state(state)
