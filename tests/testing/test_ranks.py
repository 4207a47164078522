"""The pool of ranks: results in order, failures and hangs told with what is needed to find them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable

import psutil
import pytest
import torch
import torch.distributed as dist
from waiting import wait_until

from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.errors import RankError, SlotError
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_model, tiny_qwen3_vl_moe, tiny_recipe


def _sum_of_ranks(rank: int, offset: int) -> int:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return int(total) * 10 + rank


def _warn(rank: int, message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=1)


def _raise_on_one(rank: int) -> None:
    if rank == 1:
        raise SlotError(["slot 99 of a test"])
    dist.barrier()


def _pid(rank: int) -> int:
    return os.getpid()


def _die(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _fall_silent(rank: int) -> None:
    if rank == 1:
        _a_function_to_be_found()


def _a_function_to_be_found() -> None:
    threading.Event().wait()


def test_results_in_rank_order() -> None:
    with RankPool(2) as pool:
        assert pool.run(_sum_of_ranks, 3) == [70, 71]
        assert pool.run(_sum_of_ranks, 0) == [10, 11]


def test_an_error_carries_traceback_and_cause() -> None:
    with RankPool(2) as pool:
        with pytest.raises(RankError, match=r"rank 1 of 2 raised:(.|\n)*_raise_on_one(.|\n)*slot 99") as caught:
            pool.run(_raise_on_one)
        assert isinstance(caught.value.__cause__, SlotError)
        assert not pool.alive
        with pytest.raises(RankError, match="has ended after a failure"):
            pool.run(_raise_on_one)


def test_ranks_treat_warnings_as_this_process_does() -> None:
    """A warning that is an error here is one there, except where this test says otherwise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "known: .*", UserWarning, re.escape(__name__))
        with RankPool(1) as pool:
            pool.run(_warn, "known: to this test")
            with pytest.raises(RankError, match="UserWarning: another") as caught:
                pool.run(_warn, "another")
    assert isinstance(caught.value.__cause__, UserWarning)


@pytest.mark.parametrize(("module", "ends"), [("orchestration", 1), ("megatron_deepstack.step", 1), ("another", 0)])
def test_processes_of_tests_end_with_a_warning_of_ours(module: str, ends: int) -> None:
    code = f"import warnings; warnings.warn_explicit('old', UserWarning, 'file', 1, module={module!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == ends, done.stderr
    assert "UserWarning: old" in done.stderr


def _threads_after_training(rank: int, recipe: Recipe) -> int:
    from megatron_deepstack.testing.trial import run_trial

    run_trial(rank, recipe)
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_groups_that_were_left_end_their_threads(ranks: Callable[[int], RankPool]) -> None:
    """Three a group, of twenty groups a layout: after many layouts a machine would be busy with nothing else."""
    sequence, expert = ParallelConfig(tensor=2, sequence_parallel=True), ParallelConfig(expert=2)
    cases = [(sequence, tiny_model()), (expert, tiny_qwen3_vl_moe()), (sequence, tiny_model())]
    found = [ranks(2).run(_threads_after_training, tiny_recipe(model, layout)) for layout, model in cases]
    assert found[2] == found[0]


@pytest.mark.slow
def test_a_death_is_told() -> None:
    with RankPool(2) as pool, pytest.raises(RankError, match="rank 1 of 2 died with exit code -9"):
        pool.run(_die)


@pytest.mark.slow
def test_a_death_between_two_runs_ends_the_pool() -> None:
    with RankPool(2) as pool:
        first, _ = pool.run(_pid)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(first), "the end of rank 0")
        with pytest.raises(RankError, match="rank 0 of 2 died with exit code -9"):
            pool.run(_pid)
        assert not pool.alive


@pytest.mark.slow
def test_a_hang_is_told_with_stacks() -> None:
    with RankPool(2) as pool:
        pool.run(_sum_of_ranks, 0)
        pool.deadline_seconds = 2.0
        with pytest.raises(RankError, match=r"ranks \[1\] of 2 silent for 2 s(.|\n)*_a_function_to_be_found"):
            pool.run(_fall_silent)
