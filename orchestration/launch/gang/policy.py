"""Why a gang failed: a pure decision about what its ranks said last.

When one rank dies the others fail with it, as their collectives break; so the user is told not
the failure that is seen first, but the most likely cause. Whether the gang starts again is decided in `training.retry`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from megatron_deepstack.errors import DeepStackError, RankError
from megatron_deepstack.platform.processes.cut_off import is_cut_off
from megatron_deepstack.training.retry import Failure


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
    """It does not answer any more."""
    RAISED = 5
    """Any other exception."""
    CUT_OFF = 6
    """A broken connection to another rank: a consequence as a rule."""


@dataclass(frozen=True, slots=True)
class RankEnd:
    """How one rank ended."""

    rank: int
    where: str
    """Host, address and pid, as far as known."""
    end: End
    text: str
    """The message of the exception, or of what found the rank dead."""
    error: DeepStackError | None = None
    """The expected failure, if it was one."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One failure of a gang."""

    causes: tuple[RankEnd, ...]
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
    def failure(self) -> Failure:
        """What the decision about another attempt needs."""
        first = self.causes[0]
        return Failure(first.error, first.text if first.end is End.RAISED else "")

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
    """Whether an exception of a rank is its own or a broken connection to another.

    Args:
        kind: Name of the exception's class.
        text: Its message.

    Returns:
        CUT_OFF for a broken connection, else RAISED.
    """
    return End.CUT_OFF if is_cut_off(kind, text) else End.RAISED


def diagnose(failures: Sequence[RankEnd]) -> Diagnosis:
    """Pick the cause; `failures` are of one attempt and at least one."""
    worst = min(failure.end for failure in failures)
    causes = tuple(sorted((one for one in failures if one.end is worst), key=lambda one: one.rank))
    blamed = {failure.rank for failure in causes}
    return Diagnosis(causes, tuple(sorted(one.rank for one in failures if one.rank not in blamed)))


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"
