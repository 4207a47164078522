"""Whether to start all ranks again after a failure: one decision for every launcher, without processes or files.

A mistake that the next attempt would repeat is not tried again; a death, a hang or a broken connection is. An exception
of our own code gets one more attempt, since a bad disk or a bad network may look like that too, but no second
one if the first ends with the same words.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_deepstack.errors import DeepStackError
from megatron_deepstack.platform.processes.cut_off import exception_in, is_cut_off


@dataclass(frozen=True, slots=True)
class Failure:
    """What ended an attempt, as far as the next one depends on it."""

    error: DeepStackError | None = None
    """The expected failure, where it was one."""
    exception: str = ""
    """What an exception of our own code said and where, the same when it happens again; empty for any other end."""


def is_worth_a_retry(failure: Failure, previous: Failure | None) -> bool:
    """Whether another attempt may end differently, whatever number of restarts is left.

    Args:
        failure: What ended this attempt.
        previous: What ended the attempt before; None if this was the first.

    Returns:
        False after a user's mistake or a stop on request, and after an exception that both attempts ended with.
    """
    if failure.error is not None and not failure.error.retryable:
        return False
    return not failure.exception or previous is None or failure.exception != previous.exception


def failure_of(error: DeepStackError) -> Failure:
    """The failure behind an error of ranks on this machine, whose text holds the traceback where one raised."""
    trace = str(error).partition("\n")[2].rstrip()
    return Failure(error, "" if is_cut_off(*exception_in(trace)) else trace)
