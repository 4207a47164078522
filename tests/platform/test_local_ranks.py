"""Ranks started on this machine: one result or one cause, nothing left behind, nothing listening beyond loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from waiting import wait_until

from megatron_deepstack.errors import (
    ConfigError,
    DeepStackError,
    HangError,
    LayoutError,
    PreemptedError,
    RankError,
    StoreError,
)
from megatron_deepstack.platform.compute import device
from megatron_deepstack.platform.processes.gang import Ending, Report, cause
from megatron_deepstack.platform.processes.local_ranks import launch_ranks


def _rank(behaviour: str, folder: str) -> float:
    """Join, then on rank 1 do as told while the others wait in a collective."""
    from megatron_deepstack.platform.processes.process_group import join, leave

    join()
    rank = dist.get_rank()
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    total = torch.ones(1)
    dist.all_reduce(total)
    if behaviour == "result":
        leave()
        return float(total) + 10 * rank
    if behaviour == "both refuse":
        raise ConfigError(["one thing", "another"])
    if rank == 1:
        _misbehave(behaviour, folder)
    dist.barrier()
    return 0.0


def _misbehave(behaviour: str, folder: str) -> None:
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "killed with a child":
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        Path(folder, "child").write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "damaged store":
        raise StoreError("sample 'a' cannot be read")
    if behaviour == "bug":
        raise ValueError("a bug of a test")
    if behaviour == "hang":
        os._exit(HangError.exit_code)
    if behaviour == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if behaviour == "asked":
        os.kill(os.getppid(), signal.SIGTERM)
        signal.pause()


def require_gone(folder: Path, name: str) -> None:
    """A process ends that was sent SIGKILL: on a busy machine it takes its time to."""
    pid = int((folder / name).read_text())

    def is_gone() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(is_gone, f"the end of {name}")


def test_result_of_rank_0(tmp_path: Path) -> None:
    assert launch_ranks(_rank, 2, "result", str(tmp_path)) == 2.0
    require_gone(tmp_path, "pid0")
    require_gone(tmp_path, "pid1")


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "num_gpus", lambda: 1)


@pytest.mark.usefixtures("one_gpu")
def test_more_ranks_than_gpus_are_refused_before_any_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"2 ranks on this machine take a GPU each, and it shows 1; .* the CPU$"):
        launch_ranks(_rank, 2, "result", str(tmp_path))
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("LOCAL_RANK", "3")  # what torchrun sets on the fourth of a machine
    with pytest.raises(LayoutError, match=r"4 ranks on this machine .* put CUDA_VISIBLE_DEVICES= before the command"):
        device.select_device()


@pytest.mark.parametrize(("gpus", "num_ranks"), [(2, 2), (8, 1), (0, 3)])
def test_ranks_that_have_a_gpu_each_or_none_at_all_may_start(
    monkeypatch: pytest.MonkeyPatch, gpus: int, num_ranks: int
) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: gpus > 0)
    monkeypatch.setattr(device, "num_gpus", lambda: gpus)
    device.require_devices(num_ranks)


FAILURES: dict[str, tuple[type[DeepStackError], str]] = {
    "killed": (RankError, r"^rank 1 \(pid \d+\) was killed by signal 9 \(SIGKILL\)"),
    "killed with a child": (RankError, r"^rank 1 .* killed by signal 9"),
    "damaged store": (StoreError, r"^sample 'a' cannot be read$"),
    "both refuse": (ConfigError, r"^one thing\nanother$"),
    "bug": (RankError, r"(?s)^rank 1 \(pid \d+\) raised:\n.*_misbehave.*a bug of a test$"),
    "hang": (HangError, r"^rank 1 .* found the run hanging"),
    "asked": (PreemptedError, r"^stopped on request$"),
}


QUICK = ("killed with a child", "damaged store", "bug", "asked")
"""An outside end, a user's mistake, a bug and a request to stop; the others are further forms of these."""


@pytest.mark.parametrize(
    "behaviour", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in FAILURES]
)
def test_one_cause_is_told_and_no_rank_is_left(tmp_path: Path, behaviour: str) -> None:
    """Whatever the waiting rank says about its broken collective, the message names the rank that broke it."""
    kind, words = FAILURES[behaviour]
    if behaviour == "asked":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a job script's `trap '' TERM` hands it down
    with pytest.raises(kind, match=words) as caught:
        launch_ranks(_rank, 2, behaviour, str(tmp_path))
    assert type(caught.value) is kind
    require_gone(tmp_path, "pid0")
    require_gone(tmp_path, "pid1")
    if behaviour == "killed with a child":
        require_gone(tmp_path, "child")
    if isinstance(caught.value, ConfigError):
        assert caught.value.problems == ("one thing", "another")


def _launch_forever(folder: str) -> None:
    launch_ranks(_rank, 2, "stopped", folder)


def test_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    """kill -9 of the launcher, with one rank stopped by a signal and the other waiting for it."""
    code = f"import test_local_ranks as t; t._launch_forever({str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    launcher = subprocess.Popen([sys.executable, "-c", f"if __name__ == '__main__':\n {code}"], env=environment)
    pid_files = [tmp_path / "pid0", tmp_path / "pid1"]

    def have_started() -> bool:
        assert launcher.poll() is None
        return all(file.exists() and file.read_text() for file in pid_files)

    wait_until(have_started, "two ranks", seconds=120)
    sockets = [c for c in psutil.Process(launcher.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [connection.laddr.ip for connection in sockets] == ["127.0.0.1"]
    launcher.kill()
    launcher.wait()
    require_gone(tmp_path, "pid0")
    require_gone(tmp_path, "pid1")


def test_cause() -> None:
    """A death is blamed before an expected error, that before a silent end, that before an exception of its own."""
    trace = "Traceback (most recent call last):\n  File ...\nRuntimeError: Connection closed by peer [127.0.0.1]:80"
    cut_off = Ending(6, 16, Report(trace=trace))
    raised = Ending(0, 10, Report(trace="ValueError: a bug"))
    silent = Ending(1, 11, None, 1)
    refused = Ending(2, 12, Report(error=StoreError("damaged")))
    killed = Ending(3, 13, None, -11)
    fine = Ending(4, 14, Report(result=1))
    order = [killed, refused, silent, raised, cut_off]
    for first in range(5):
        assert cause([fine, *reversed(order[first:])]) is order[first]
    assert "signal 11 (SIGSEGV)" in str(killed.as_error())
    assert cause([raised, Ending(5, 15, Report(trace="later"))]) is raised
