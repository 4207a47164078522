"""Why a gang failed, and whether to start it again: pure decisions about what its ranks said last.

When one rank dies the others fail with it, as their collectives break; so the failure to tell the user is not the first
that is seen, but the likeliest cause. A mistake that the next attempt would repeat is not tried again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from megatron_deepstack.errors import DeepStackError, RankError


class End(IntEnum):
    """How a rank ended; the lower, the likelier the cause."""

    NODE_DIED = 0
    DIED = 1
    """The process, by a signal or an exit of its own."""
    HUNG = 2
    """It found the run hanging and ended itself."""
    REFUSED = 3
    """An expected failure, from errors.py."""
    SILENT = 4
    """It answers no question any more."""
    RAISED = 5
    """Any other exception."""
    CUT_OFF = 6
    """A broken connection to another rank: a consequence as a rule."""


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
    """How one rank ended."""

    rank: int
    where: str
    """Host, address and pid, as far as known."""
    end: End
    text: str
    """The message of the exception, or of what found the rank dead."""
    error: DeepStackError | None = None
    """The expected failure, where that is what it was."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One failure of a gang."""

    causes: tuple[Failure, ...]
    """The ranks to blame, most often one."""
    followers: tuple[int, ...]
    """Ranks that failed with them."""

    @property
    def text(self) -> str:
        """What the user reads, once for all ranks."""
        first = self.causes[0]
        who = f"{_ranks([failure.rank for failure in self.causes])} ({first.where})"
        also = f"; {_ranks(self.followers)} failed with it" if self.followers else ""
        return f"{who} {_WORDS[first.end]}{first.text}{also}"

    @property
    def error(self) -> DeepStackError:
        """What `launch` raises where this ends the run."""
        found = next((failure.error for failure in self.causes if failure.error is not None), None)
        return found if found is not None else RankError(self.text)


_WORDS = {
    End.NODE_DIED: "was lost with its node: ",
    End.DIED: "died: ",
    End.HUNG: "ended itself: ",
    End.REFUSED: "stopped: ",
    End.SILENT: "does not answer: ",
    End.RAISED: "raised ",
    End.CUT_OFF: "lost a connection: ",
}


def end_of_exception(kind: str, text: str) -> End:
    """Whether an exception of a rank is its own or a broken connection to another."""
    lowered = text.lower()
    broken = kind in _CUT_OFF_KINDS and any(word in lowered for word in _CUT_OFF_WORDS)
    return End.CUT_OFF if broken else End.RAISED


def diagnose(failures: Sequence[Failure]) -> Diagnosis:
    """Pick the cause; `failures` are of one attempt and at least one."""
    worst = min(failure.end for failure in failures)
    causes = tuple(sorted((one for one in failures if one.end is worst), key=lambda one: one.rank))
    blamed = {failure.rank for failure in causes}
    return Diagnosis(causes, tuple(sorted(one.rank for one in failures if one.rank not in blamed)))


def is_worth_a_retry(diagnosis: Diagnosis, previous: Diagnosis | None) -> bool:
    """Whether another attempt may end otherwise, budget aside.

    Not after a mistake of the user or a stop on request, and not after an exception of our own code that the attempt
    before ended with too.
    """
    first = diagnosis.causes[0]
    if first.end is End.REFUSED:
        return bool(getattr(first.error, "retryable", False))
    if first.end is End.RAISED and previous is not None:
        return previous.causes[0].text != first.text
    return True


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"
