"""One rank as Ray Train runs it: its environment, its log, and how its end reaches the driver.

Ray Train calls `run_rank` in a thread of the worker process; `enter` was called in its main thread before. The process
group is joined by `training.main.train` itself, as under torchrun, so that Megatron's adaptations, time-outs and the
device are set by the same code everywhere.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import DeepStackError, PreemptedError
from megatron_deepstack.platform.network import interface_of
from megatron_deepstack.training.guard.preemption import never
from orchestration.launch.driver.record import rank_log
from orchestration.launch.driver.stopping import is_asked
from orchestration.launch.environment import take

_kept: list[Any] = []
"""The store that ranks meet in lives as long as the process of rank 0."""


@dataclass(frozen=True, slots=True)
class RankTask:
    """What every rank is told."""

    recipe: Recipe
    folder: str
    """Working folder of the driver, which relative paths of the recipe start from."""
    stop_after: int | None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Private variables, set in the rank's process."""


class RankFailed(Exception):
    """How a rank ended, in values that survive the way to the driver."""

    def __init__(self, where: str, kind: str, text: str, error: DeepStackError | None) -> None:
        super().__init__(f"{where}: {kind}: {text}")
        self.where, self.kind, self.text, self.error = where, kind, text, error

    def __reduce__(self) -> tuple[type[RankFailed], tuple[str, str, str, DeepStackError | None]]:
        return type(self), (self.where, self.kind, self.text, self.error)


def run_rank(task: RankTask) -> str | None:
    """Train; returns None at the end of the run, or the message of a stop on request. Raises RankFailed."""
    take(task.environment)
    try:
        if os.path.isdir(task.folder):  # or the checks have found all paths to be absolute
            os.chdir(task.folder)
        speak_into(rank_log(Path(task.recipe.run_dir), int(os.environ["RANK"])))
        from megatron_deepstack.training.main import train

        train(task.recipe, task.stop_after, _asked(Path(task.recipe.run_dir)))
    except PreemptedError as error:
        return str(error)
    except DeepStackError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise RankFailed(here(), type(error).__name__, str(error), error) from None
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        raise RankFailed(here(), type(error).__name__, text, None) from None
    return None


def _asked(run_dir: Path) -> Callable[[], bool]:
    """Whether `stop` was called; rank 0 looks for its file each step, and one rank's word is enough."""
    return partial(is_asked, run_dir.absolute()) if os.environ["RANK"] == "0" else never


def here() -> str:
    """The name of this process for people."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


def speak_into(log: Path) -> None:
    """Send all that this process prints, C++ and forked children included, to its files in the run folder."""
    log.parent.mkdir(parents=True, exist_ok=True)
    for number, path, name in ((1, log, "stdout"), (2, log.with_suffix(".err"), "stderr")):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
        setattr(sys, name, os.fdopen(os.dup(number), "w", buffering=1, encoding="utf-8", errors="replace"))


def open_meeting_point(address: str) -> int:
    """Keep a store on a free port of this node's own address, and nowhere else; rank 0's process calls it."""
    import torch.distributed as dist

    listener = socket.create_server((address, 0))
    port: int = listener.getsockname()[1]
    _kept[:] = [
        dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
        )
    ]
    return port


def enter(place: Mapping[str, int], own_address: str, master_address: str, master_port: int) -> None:
    """Set the variables that `platform.process_group.join` reads, and the interface that neighbours are reached by.

    Args:
        place: RANK, WORLD_SIZE and the other numbers of this rank, as torchrun names them.
        own_address: Address of this node.
        master_address: Address of rank 0's node.
        master_port: The port there, on which the store already listens.
    """
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(
        MASTER_ADDR=master_address,
        MASTER_PORT=str(master_port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store is open already; rank 0 must not open another
    )
    interface = interface_of(own_address)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interface is not None:
            os.environ.setdefault(name, interface)
