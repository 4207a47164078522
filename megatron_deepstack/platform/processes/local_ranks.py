"""Starting ranks on this machine from one command, without torchrun.

The ranks meet in a store that this process keeps on a port of the loopback interface, picked by the operating system;
torch's own launcher would listen on every interface. SIGTERM and SIGINT to this process reach the ranks as SIGTERM, and
it waits for what they save; torch's would kill them after 30 seconds.
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
    """Run a module-level `function(*args)` in each of `num_ranks` processes. When a rank fails the others are ended.

    Args:
        function: What each rank runs; found by its name there.
        num_ranks: Processes.
        args: For `function`; they are pickled.
        stopped: What the user is told where this process was asked to stop and the ranks had nothing to say: what
            became of the work, and how to go on.

    Returns:
        Rank 0's result.

    Raises:
        DeepStackError: The error of errors.py that a rank raised; it names the rank that met it alone.
        RankError: A rank died, or raised anything else; its message names it.
        HangError: The ranks found themselves hanging.
        PreemptedError: This process was asked to stop.
        LayoutError: The ranks outnumber the GPUs; none was started.
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
    """Hand SIGTERM and SIGINT on to the ranks; only a process's main thread can."""
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
    """A rank's life: it ends with its launcher, and tells it how it ended."""
    os.setpgid(0, 0)
    die_with_parent(launcher)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR=_LOOPBACK,
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the launcher keeps the store; rank 0 must not open one
    )
    try:
        pipe.send(Report(result=function(*args)))
    except DeepStackError as error:
        pipe.send(Report(error=error))
        os._exit(error.exit_code)
    except BaseException:
        pipe.send(Report(trace=traceback.format_exc()))
        os._exit(1)
