"""Starting ranks on this machine from one command, without torchrun.

The ranks meet in a `TCPStore` of this process, on a port of the loopback interface that the operating system picks;
torch's launcher would listen on every interface. This process forwards SIGTERM and SIGINT to the ranks as SIGTERM, and
waits until they have saved; torch's launcher would kill them after 30 seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from megatron_deepstack.errors import DeepStackError
from megatron_deepstack.platform.compute.device import require_devices
from megatron_deepstack.platform.processes.gang import STOPPED, Gang, Report
from megatron_deepstack.platform.processes.parent import die_with_parent

_LOOPBACK = "127.0.0.1"
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


def launch_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, stopped: str = STOPPED) -> Any:
    """Run `function(*args)` in each of several new processes. When a rank fails, the others are ended.

    Args:
        function: Function of a module that each rank runs; each rank imports it by its name.
        num_ranks: Number of processes.
        *args: Arguments of `function`; they are pickled.
        stopped: Message to the user if this process is asked to stop and the ranks report nothing. It says what
            happened to the work, and how to continue.

    Returns:
        The result of rank 0.

    Raises:
        DeepStackError: The expected error that a rank raised; it names the rank if only that rank met it.
        RankError: A rank, which the message names, died or raised another exception.
        HangError: The ranks detected a hang.
        PreemptedError: This process was asked to stop.
        LayoutError: There are more ranks than GPUs; no rank was started.
    """
    require_devices(num_ranks)
    listener = socket.create_server((_LOOPBACK, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        _LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
    )
    gang = _start(function, args, num_ranks, port, stopped)
    try:
        with _stop_signals(gang):
            return gang.wait()
    finally:
        del store


def _start(function: Callable[..., Any], args: tuple[Any, ...], num_ranks: int, port: int, stopped: str) -> Gang:
    saved = dict(os.environ)
    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    try:
        for rank in range(num_ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(os.getpid(), rank, num_ranks, port, theirs, function, args))
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
    except BaseException:
        Gang(processes, pipes).kill()
        raise
    finally:
        os.environ.clear()
        os.environ.update(saved)
    return Gang(processes, pipes, stopped)


@contextmanager
def _stop_signals(gang: Gang) -> Iterator[None]:
    """Forward SIGTERM and SIGINT to the ranks in the block; only the main thread of a process can do that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda *_: gang.ask_to_stop()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rank(
    launcher: int,
    rank: int,
    num_ranks: int,
    port: int,
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Run in the process of a rank: call the function and report how it ended. The rank dies with its launcher."""
    os.setpgid(0, 0)
    die_with_parent(launcher)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a launcher under `trap '' TERM` hands down that it is ignored
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR=_LOOPBACK,
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the launcher has the TCPStore; rank 0 must not open one
    )
    try:
        pipe.send(Report(result=function(*args)))
    except DeepStackError as error:
        pipe.send(Report(error=error))
        os._exit(error.exit_code)
    except BaseException:
        pipe.send(Report(trace=traceback.format_exc()))
        os._exit(1)
