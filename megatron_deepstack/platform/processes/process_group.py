"""Joining and leaving `torch.distributed`, with the environment variables that torchrun and Ray Train set.

Before there is a process group, ranks meet in a `TCPStore`, a small server of keys and values. There a rank tells the
others if it cannot start, so that all exit with the same error, even if a rank has no device for collectives.
"""

from __future__ import annotations

import errno
import os
import pickle
import socket
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch.distributed as dist

from megatron_deepstack.errors import ConfigError, DeepStackError, LayoutError, RankError, agreed_error
from megatron_deepstack.platform.compute.device import backend, select_device

_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


DEFAULT_SECONDS: Final = 600.0
"""Default of the longest wait of a collective."""
_LEAVE: Final = timedelta(seconds=10)
"""Longest time that rank 0 waits after an error until all ranks have read it."""


def join(timeout_seconds: float = DEFAULT_SECONDS, problem: DeepStackError | None = None) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe. Collective over all ranks.

    If a launcher has already joined the group, only the device is selected.

    Args:
        timeout_seconds: Longest wait for other ranks, here and in each collective.
        problem: Why this rank cannot start, such as an error about its recipe; None if it can start.

    Raises:
        DeepStackError: The same error on every rank, if any rank has a problem or does not have the device it needs.
        ConfigError: Another process has the port, or the variables do not have the values that torch expects.
        RankError: The ranks did not meet in time.
        LayoutError: The variables are not set, since no launcher started this process.
    """
    try:
        select_device()
    except DeepStackError as error:
        problem = problem or error
    if dist.is_initialized():
        if problem is not None:
            raise problem
        return
    missing = [name for name in _REQUIRED if name not in os.environ]
    if missing:
        raise LayoutError(
            [f"environment: {', '.join(missing)} not set; start ranks with `megatron-deepstack train`, torchrun or Ray"]
        )
    store, rank, num_ranks = _meet(timeout_seconds)
    _agree(dist.PrefixStore("start", store), rank, num_ranks, problem, timedelta(seconds=timeout_seconds))
    dist.init_process_group(
        backend(),
        store=dist.PrefixStore("ranks", store),
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=timeout_seconds),
    )


def _meet(timeout_seconds: float) -> tuple[dist.Store, int, int]:
    """Return the TCPStore in which all ranks meet, this rank, and the number of ranks."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    _require_free_port()
    try:
        store, rank, num_ranks = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    except (ValueError, OverflowError) as error:
        found = ", ".join(f"{name}={os.environ[name]!r}" for name in _REQUIRED)
        raise ConfigError([f"environment: found {found}, expected whole numbers and an address ({error})"]) from error
    except (dist.DistError, RuntimeError) as error:
        raise RankError(
            f"rank {os.environ['RANK']} did not meet the other ranks at {where} (MASTER_ADDR, MASTER_PORT) within "
            f"{timeout_seconds:.0f} s: {_first_line(error)}. Look whether all {os.environ['WORLD_SIZE']} ranks have "
            "started, and whether a firewall or another program has that port"
        ) from error
    return store, rank, num_ranks


def _require_free_port() -> None:
    """Raise ConfigError if rank 0 has to open the TCPStore at a port that another process uses."""
    if os.environ["RANK"] != "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    port = os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError([f"environment: MASTER_PORT={port!r}, expected a free port, 1 to 65535"])
    try:
        socket.create_server(("", int(port))).close()
    except OSError as error:
        found = "another process has it" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise ConfigError(
            [
                f"environment: MASTER_PORT={port} cannot be opened on {socket.gethostname()}: {found}. Set it to a "
                "free port (torchrun: --master-port, or --standalone on one machine)"
            ]
        ) from error


def _agree(store: dist.Store, rank: int, num_ranks: int, problem: DeepStackError | None, timeout: timedelta) -> None:
    """Wait until all ranks have reported whether they can start; if one cannot, raise the same error on all ranks."""
    if problem is not None:
        store.set(f"problem/{rank}", pickle.dumps((socket.gethostname(), problem)).hex())
        store.add("problems", 1)
    _wait_for_all(store, "arrived", num_ranks, timeout)
    if not store.add("problems", 0):
        return
    found = {
        other: pickle.loads(bytes.fromhex(store.get(f"problem/{other}").decode()))
        for other in range(num_ranks)
        if store.check([f"problem/{other}"])
    }
    with suppress(dist.DistError, RuntimeError):  # rank 0 may own the TCPStore, so it waits for the others
        _wait_for_all(store, "informed", num_ranks, _LEAVE if rank == 0 else timedelta(0))
    raise agreed_error(found, num_ranks) from problem


def _wait_for_all(store: dist.Store, name: str, num_ranks: int, timeout: timedelta) -> None:
    if store.add(f"{name}/count", 1) == num_ranks:
        store.set(f"{name}/all", "yes")
    if timeout:
        store.wait([f"{name}/all"], timeout)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def join_by_file(path: Path, rank: int, num_ranks: int, timeout_seconds: float = DEFAULT_SECONDS) -> None:
    """Join a process group of ranks on one machine that meet in a file. Collective over all ranks.

    Args:
        path: The file, the same on all ranks; no process group may have used it before.
        rank: This rank.
        num_ranks: Number of all ranks.
        timeout_seconds: Longest wait for other ranks, here and in each collective.
    """
    select_device()
    dist.init_process_group(
        backend(),
        init_method=f"file://{path}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=timeout_seconds),
    )


def leave() -> None:
    """Leave the process group, if this rank has joined one. Do not call it after a failure, since others may hang."""
    if dist.is_initialized():
        dist.destroy_process_group()
