"""Whether to start all ranks again after a failure: one decision for every launcher, without processes or files.

A mistake that the next attempt would repeat is not tried again; a death, a hang or a broken connection is. An exception
of our own code gets one more attempt, since a bad disk or a bad network shows itself in such a way too, but not a
second one that ends with the same words.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_deepstack.errors import DeepStackError

_CUT_OFF_WORDS = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "broken pipe",
    "gloo",
    "nccl",
    "socket",
    "timed out waiting",
    "store->get",
)
_CUT_OFF_KINDS = ("DistBackendError", "DistNetworkError", "DistStoreError", "ConnectionError", "RuntimeError")


@dataclass(frozen=True, slots=True)
class Failure:
    """What ended an attempt, as far as the next one depends on it."""

    error: DeepStackError | None = None
    """The expected failure, where it was one."""
    exception: str = ""
    """What an exception of our own code said and where, the same when it happens again; empty for any other end."""


def is_worth_a_retry(failure: Failure, previous: Failure | None) -> bool:
    """Whether another attempt may end otherwise, the budget of restarts aside.

    Args:
        failure: What ended this attempt.
        previous: What ended the attempt before; None if this was the first.

    Returns:
        False after a user's mistake or a stop on request, and after an exception that both attempts ended with.
    """
    if failure.error is not None and not failure.error.retryable:
        return False
    return not failure.exception or previous is None or failure.exception != previous.exception


def is_cut_off(kind: str, text: str) -> bool:
    """Whether an exception is a broken connection to another rank: the consequence of another rank's end, as a rule.

    Args:
        kind: Name of the exception's class.
        text: What it says.
    """
    lowered = text.lower()
    return kind.rpartition(".")[2] in _CUT_OFF_KINDS and any(word in lowered for word in _CUT_OFF_WORDS)


def failure_of(error: DeepStackError) -> Failure:
    """The failure behind an error of ranks on this machine, whose text holds the traceback where one raised."""
    trace = str(error).partition("\n")[2].rstrip()
    kind, _, text = trace.rpartition("\n")[2].partition(": ")
    return Failure(error, "" if is_cut_off(kind, text) else trace)
