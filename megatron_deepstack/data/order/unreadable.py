"""Samples whose views cannot be read: found by the rank that reads them, left out of the loss by all of a replica.

Only one rank reads a view, so only it knows. Under `data.unreadable: skip` it goes on with black pixels and says which
samples they belong to; once the ranks have told each other, each applies `without` to its plan, which takes the
samples' targets away and nothing else: shapes, routes and all other samples stay as they were. A sample without targets
has no influence on any gradient, since samples of a pack do not see each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_deepstack.planning.batch.step_plan import StepPlan
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX

Where = tuple[int, int, int]
"""Place of a sample in a step: micro-batch, row, and number within the row (0 but for packs)."""


@dataclass(frozen=True, slots=True)
class UnreadableSample:
    """A sample that this rank could not read."""

    where: Where
    index: int
    """Number of the sample in the store or mixture."""
    id: str
    reason: str


def without(plan: StepPlan, samples: Iterable[Where]) -> StepPlan:
    """The plan with the targets of these samples taken away; pure."""
    labels = [array.copy() for array in plan.labels]
    for micro_batch, row, member in samples:
        begin, end = 0, plan.seq_length
        if plan.segments is not None:
            ends = plan.segments[micro_batch]
            begin, end = ends[member - 1] if member else 0, ends[member]
        labels[micro_batch][row, begin:end] = IGNORE_INDEX
    return replace(plan, labels=tuple(labels))
