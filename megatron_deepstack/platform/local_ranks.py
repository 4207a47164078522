"""Starting ranks on this machine, as torchrun does, from one command."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_deepstack.errors import DeepStackError, RankError
from megatron_deepstack.platform.device import has_gpu
from megatron_deepstack.platform.parent import die_with_parent

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
_USER_ERROR_EXIT = 64


def launch_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> Any:
    """Run a module-level `function(*args)` in each of `num_ranks` processes; returns rank 0's result.

    The rendezvous is a port that the operating system picks on the loopback interface. When a rank fails the others
    are ended, and RankError says which it was.
    """
    saved = dict(os.environ)
    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
    if not has_gpu():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id="local",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        return elastic_launch(config, _guarded)(function, args)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == _USER_ERROR_EXIT:
            raise RankError(f"rank {rank} stopped the run; its message is above") from None
        raise RankError(f"rank {rank} (pid {failure.pid}) ended with exit code {failure.exitcode}") from None
    finally:
        os.environ.clear()
        os.environ.update(saved)


def _guarded(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """A rank, which ends with its launcher. The first one tells users' mistakes, once and without a traceback."""
    die_with_parent()
    try:
        return function(*args)
    except DeepStackError as error:
        if os.environ.get("RANK") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(_USER_ERROR_EXIT)
    except Exception:
        print(f"rank {os.environ.get('RANK')}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)
