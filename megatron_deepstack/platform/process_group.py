"""Joining and leaving `torch.distributed`, as torchrun and Ray Train describe it in the environment."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch.distributed as dist

from megatron_deepstack.errors import LayoutError
from megatron_deepstack.platform.device import backend, select_device

_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


DEFAULT_SECONDS: Final = 600.0
"""Longest wait of a collective, unless the caller says otherwise."""


def join(timeout_seconds: float = DEFAULT_SECONDS) -> None:
    """Join the process group named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Collective over all ranks.

    Does nothing where a launcher (Ray Train) has joined already. Raises LayoutError outside any launcher.
    """
    select_device()
    if dist.is_initialized():
        return
    missing = [name for name in _REQUIRED if name not in os.environ]
    if missing:
        raise LayoutError(
            [f"environment: {', '.join(missing)} not set; start ranks with `megatron-deepstack train`, torchrun or Ray"]
        )
    dist.init_process_group(backend(), timeout=timedelta(seconds=timeout_seconds))


def join_by_file(path: Path, rank: int, num_ranks: int, timeout_seconds: float = DEFAULT_SECONDS) -> None:
    """Join ranks of one machine that meet in a file no group has used before. Collective over all ranks."""
    select_device()
    dist.init_process_group(
        backend(),
        init_method=f"file://{path}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=timeout_seconds),
    )


def leave() -> None:
    """Leave the process group, if joined. Not called after a failure: no collective then."""
    if dist.is_initialized():
        dist.destroy_process_group()
