"""Variables of the driver that ranks get too, and which of them nobody else may see.

Ray keeps the variables of a runtime environment with the job, and shows them in its dashboard, its state API and its
logs. Credentials therefore travel inside what is sent to the ranks, whose content Ray does not show, and are set in the
rank's process before anything of ours looks for them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

_FORWARDED: Final = (
    *("NCCL_", "FI_", "GLOO_", "TORCH_", "PYTORCH_", "CUDA_", "NVTE_", "OMP_"),
    *("HF_", "WANDB_", "AWS_", "FSSPEC_"),
)
"""Variables that ranks on other nodes get too, by their first letters. FI_ are those of libfabric, over which NCCL
reaches other nodes in some clouds."""
_NOT_FORWARDED: Final = ("CUDA_VISIBLE_DEVICES",)
_OF_RANKS: Final = {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
_PRIVATE: Final = ("HF_", "WANDB_", "AWS_", "FSSPEC_")
"""Services with accounts: all their variables, since credentials have many names and forms."""
_SECRET_WORDS: Final = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    """Variables of every rank."""

    shown: Mapping[str, str]
    """Set by Ray before a rank's process begins, and shown by Ray to everyone who may look at the cluster."""
    private: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Set by the rank itself, see `take`."""


def rank_environment(environment: Mapping[str, str]) -> RankEnvironment:
    """What torchrun's users set for NCCL, torch, storage and the like, and our defaults.

    Args:
        environment: The driver's variables.
    """
    forwarded = {
        name: value
        for name, value in environment.items()
        if (name.startswith(_FORWARDED) and name not in _NOT_FORWARDED) or name == "PYTHONWARNINGS"
    }
    private = {name: value for name, value in forwarded.items() if is_private(name)}
    shown = {name: value for name, value in forwarded.items() if name not in private}
    return RankEnvironment(_OF_RANKS | shown, private)


def is_private(name: str) -> bool:
    """Whether a variable may hold a credential, by its name."""
    return name.startswith(_PRIVATE) or any(word in name.upper() for word in _SECRET_WORDS)


def take(private: Mapping[str, str]) -> None:
    """Set the private variables in this process, once it has begun; a rank calls it before it trains.

    fsspec reads its variables when it is imported, which Ray may have done already; it reads them again.
    """
    os.environ.update(private)
    if any(name.startswith("FSSPEC_") for name in private) and "fsspec.config" in sys.modules:
        config: Any = importlib.import_module("fsspec.config")
        config.set_conf_env(config.conf)
