"""Whether all ranks start again after a failure: the same answer for every launcher."""

from __future__ import annotations

import pytest

from megatron_deepstack.errors import (
    CheckpointError,
    ConfigError,
    DeepStackError,
    HangError,
    HealthError,
    PreemptedError,
    RankError,
)
from megatron_deepstack.training.retry import Failure, failure_of, is_worth_a_retry

DEATH = Failure()
NCCL = "torch.distributed.DistBackendError: NCCL error\nsocketProgress: Connection closed by remote peer"
BUG, OTHER_BUG = Failure(exception="ValueError: a (step.py:7)"), Failure(exception="ValueError: b (step.py:9)")


@pytest.mark.parametrize(
    ("now", "before", "again"),
    [
        (DEATH, None, True),
        (DEATH, DEATH, True),
        (DEATH, BUG, True),
        (Failure(ConfigError(["wrong"])), None, False),
        (Failure(CheckpointError("other model")), None, False),
        (Failure(HealthError("no finite loss")), None, False),
        (Failure(PreemptedError("asked")), None, False),
        (Failure(HangError("silent")), None, True),
        (Failure(HangError("silent")), Failure(HangError("silent")), True),
        (BUG, None, True),
        (BUG, OTHER_BUG, True),
        (BUG, BUG, False),
        (BUG, DEATH, True),
    ],
)
def test_mistakes_are_not_tried_again(now: Failure, before: Failure | None, again: bool) -> None:
    assert is_worth_a_retry(now, before) is again


def raised(line: str, pid: int) -> RankError:
    return RankError(f"rank 0 (pid {pid}) raised:\nTraceback (most recent call last):\n  File ...\n{line}")


@pytest.mark.parametrize(
    ("first", "second", "again"),
    [
        (raised("ValueError: 1 is not 2", 10), raised("ValueError: 1 is not 2", 11), False),
        (raised("ValueError: 1 is not 2", 10), raised("ValueError: 3 is not 4", 11), True),
        (raised("RuntimeError: Connection reset", 1), raised("RuntimeError: Connection reset", 2), True),
        (raised(NCCL, 1), raised(NCCL, 2), True),
        (RankError("rank 1 (pid 3) was killed"), RankError("rank 1 (pid 3) was killed"), True),
        (HangError("the run hangs"), HangError("the run hangs"), True),
    ],
    ids=["same exception", "another exception", "broken connection", "NCCL", "killed", "hang"],
)  # fmt: skip
def test_errors_of_local_ranks(first: DeepStackError, second: DeepStackError, again: bool) -> None:
    """The process id differs each time, and tells nothing."""
    assert is_worth_a_retry(failure_of(first), None)
    assert is_worth_a_retry(failure_of(second), failure_of(first)) is again
