"""Joining and leaving `torch.distributed`, as torchrun and Ray Train describe it in the environment.

Ranks meet in a store (a small server of keys and values) before there is a process group. What keeps a rank from
starting is told to the others there, so that all leave with one error, also where a rank has no device to talk by.
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
"""Longest wait of a collective, unless the caller says otherwise."""
_LEAVE: Final = timedelta(seconds=10)
"""Longest that rank 0 stays after an error, for ranks that have still to read it."""


def join(timeout_seconds: float = DEFAULT_SECONDS, problem: DeepStackError | None = None) -> None:
    """Join the process group named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Collective over all ranks.

    Does nothing where a launcher has joined already.

    Args:
        timeout_seconds: Longest wait for other ranks, here and in each collective.
        problem: What keeps this rank from starting, such as a recipe that it cannot read; None if nothing does.

    Raises:
        DeepStackError: The same on every rank, if any has a problem or not the device it needs.
        ConfigError: The port is taken, or the variables are not what torch expects.
        RankError: The ranks did not meet in time.
        LayoutError: Outside any launcher.
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
    """The store that all ranks meet in, this rank and their number."""
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
    """Raise ConfigError if rank 0 is to open the store at a port that another process has."""
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
    """Wait until all ranks have said whether they can start; raise the same error on all if one cannot."""
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
    with suppress(dist.DistError, RuntimeError):  # rank 0 may keep the store: it stays until the others have read
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
