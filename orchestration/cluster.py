"""Reaching a Ray cluster: an existing one, or one started on this machine for the length of a job."""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final

import psutil
from rich.console import Console

from megatron_deepstack.errors import ClusterError, ConfigError, DeepStackError
from megatron_deepstack.platform.files.scratch import Scratch
from orchestration.ray_folder import disk_fault, given_to_ray, ray_folder

_OBJECT_STORE_BYTES: Final = 128 * 2**20
"""Ray's shared memory on a machine of our own: workers write in place, little travels through it."""
_LOOPBACK: Final = "127.0.0.1"
"""The one address that all of Ray's servers bind to alone, if it is left as it is; see `_kept_to_loopback`."""
_NO_METRICS: Final = {"RAY_enable_metrics_collection": "0"}
"""Its exporter would listen on every interface."""
_STARTS: Final = 2
"""Tries to start a Ray of our own on a machine that is too busy for the first."""
_TOO_SLOW: Final = "timed out during startup"
"""Ray's words for a node that was not up within 30 s, a time that no setting of Ray 2.60 changes."""
_END_SECONDS: Final = 10.0
"""Longest wait for the end of a process that was killed."""
_KNOCK_SECONDS: Final = 10.0
"""Longest wait for a cluster's port."""
_TOKEN: Final = (
    "a cluster that was started with a token (`ray start` takes the one in ~/.ray/auth_token, if there is one) "
    "wants RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN here, or that same file"
)
_NOT_NEWS: Final = "A worker died or was killed while executing a task"
"""Ray says so in ten lines of possible causes for each worker; drivers tell of a death in one, in their own words."""


@contextmanager
def ray_session(
    workers: int | None, address: str | None, environment: Mapping[str, str], *, gpus: int | None = 0
) -> Iterator[bool]:
    """A running Ray: the one this process already uses, the cluster at `address`, or one started here on loopback.

    A Ray that was started or joined here is shut down at the end. The sockets and logs of one that was started here lie
    in a folder of this machine that is removed at the end; see `ray_folder`.

    Args:
        workers: CPUs of a Ray that is started here; all of the machine's if None.
        address: An existing cluster. If None, RAY_ADDRESS of the environment counts, which `ray job submit` sets.
        environment: Variables for all processes of a Ray that is started here. Elsewhere a task has to ask for them by
            a runtime environment, which takes 3 s to begin with.
        gpus: GPUs of a Ray that is started here; all of the machine's if None.

    Yields:
        Whether Ray was started here, with `environment` in all its processes.

    Raises:
        ConfigError: No cluster answers at `address`.
        ClusterError: The cluster refuses this process, or Ray does not start here.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    ray = import_ray(address)
    if ray.is_initialized():
        yield False
        return
    with ExitStack() as at_the_end:
        if address is not None:
            _join(ray, address)
        else:
            folder, passed_over = ray_folder(os.environ)
            at_the_end.enter_context(folder)
            for line in passed_over:
                _note(line)
            with _environment({**environment, **_NO_METRICS}), _kept_to_loopback():
                _start(ray, workers, gpus, folder)
        at_the_end.callback(ray.shutdown)
        yield address is None


def _start(ray: Any, workers: int | None, gpus: int | None, folder: Scratch) -> None:
    """Start Ray here, in `folder`; once more if the machine was too busy the first time."""
    for remaining in reversed(range(_STARTS)):
        try:
            ray.init(
                address="local",
                num_cpus=workers or len(os.sched_getaffinity(0)),
                num_gpus=gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=_OBJECT_STORE_BYTES,
                _node_ip_address=_LOOPBACK,
                _temp_dir=str(given_to_ray(folder)),
            )
            return
        except DeepStackError:
            raise
        except Exception as error:  # Ray has no class of its own for this
            ray.shutdown()
            _end_processes_in(folder)
            if not remaining or _TOO_SLOW not in str(error) or disk_fault(folder.path):
                raise ClusterError(_why_not_started(folder, str(error))) from error
            _note("Ray was not up within its 30 s; this machine seems busy. It is started once more.")


def _note(line: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"note: {line}", markup=False)


def _end_processes_in(folder: Scratch) -> None:
    """End the processes of a Ray that came up by halves: `ray.shutdown` knows of none before all of them are up."""
    started = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(str(folder.path) in argument for argument in child.cmdline()):
                child.kill()
                started.append(child)
    psutil.wait_procs(started, timeout=_END_SECONDS)


def _why_not_started(folder: Scratch, said: str) -> str:
    """What kept Ray from starting here, and what to do; `said` is what Ray says, which is seldom the cause."""
    fault = disk_fault(folder.path)
    if fault:
        return (
            f"Ray does not start on this machine: its folder {folder.path} {fault}. Make room there, or name another "
            f"folder in RAY_TMPDIR, then run the same command again. Ray said: {said}"
        )
    folder.kept = True
    return (
        f"Ray does not start on this machine: {said} See its load, its free memory and Ray's logs in "
        f"{given_to_ray(folder)}/session_latest/logs (kept until the next start), then run the same command again."
    )


def _join(ray: Any, address: str) -> None:
    """Connect to a running cluster. Ray itself tries for minutes, so we knock first."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    try:
        if separator and port.isdecimal():
            socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        advice = f"`ray status` on its head node shows the address, whose port is not the dashboard's; {_TOKEN}"
        raise ConfigError([f"--address {address}: no Ray cluster answers there: {error}. {advice}"]) from error
    except Exception as error:  # Ray has a RuntimeError for other versions, errors of its own for tokens
        ray.shutdown()
        raise ClusterError(
            f"--address {address}: the Ray cluster there does not let this process in: {' '.join(str(error).split())}. "
            f"Both need the same Ray and the same Python; {_TOKEN}"
        ) from error


def import_ray(address: str | None) -> Any:
    """Ray, with the settings it reads at import and keeps for the life of the process; the user's own come first.

    A local Ray is started with token authentication: other users of the machine reach its ports too, and Ray runs what
    it is sent. The token stays in the environment: left to itself Ray 2.60 writes one to `~/.ray`, which breaks
    `ray start --address` of the same user.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _NOT_NEWS)
    if "ray" not in sys.modules and address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    return importlib.import_module("ray")


@contextmanager
def _kept_to_loopback() -> Iterator[None]:
    """Let Ray really use 127.0.0.1 if it is told to.

    Ray 2.60 puts the machine's public address in its place, so that other nodes could join, and its servers then listen
    on every interface; seen with 127.0.0.2 too. A Ray for one job on one machine has no other nodes.
    """
    from orchestration.ray_private import services

    resolve = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = resolve


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables for the processes started in this block."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
