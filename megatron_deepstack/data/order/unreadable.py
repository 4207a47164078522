"""Samples whose views cannot be read: one rank finds them, and all ranks of its replica leave them out of the loss.

Only one rank reads a view, so only that rank knows of the fault. Under `data.unreadable: skip` it continues with black
pixels and reports the samples. Once the ranks have exchanged their reports, each applies `without` to its plan. This
removes the samples' targets and nothing else: shapes, routes and all other samples stay as they were. A sample without
targets has no influence on any gradient, since samples of a pack do not see each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_deepstack.planning.batch.step_plan import StepPlan
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX

Where = tuple[int, int, int]
"""Place of a sample in a step: micro-batch, row, and number within the row (always 0 if rows are not packed)."""


@dataclass(frozen=True, slots=True)
class UnreadableSample:
    """A sample that this rank could not read."""

    where: Where
    index: int
    """Number of the sample in the store or mixture."""
    id: str
    reason: str


def without(plan: StepPlan, samples: Iterable[Where]) -> StepPlan:
    """The plan without the targets of some samples; pure. All ranks of a replica must pass the same samples.

    Args:
        plan: The replica's plan, which is not changed.
        samples: Places of the samples.

    Returns:
        The plan, with `IGNORE_INDEX` as the labels of these samples, which then have no targets to be weighed by in
        the loss that balances experts either.
    """
    labels, members = [array.copy() for array in plan.labels], list(plan.members)
    for micro_batch, row, member in samples:
        begin, end = 0, plan.seq_lengths[micro_batch]
        if plan.segments is not None:
            ends = plan.segments[micro_batch]
            begin, end = ends[member - 1] if member else 0, ends[member]
        labels[micro_batch][row, begin:end] = IGNORE_INDEX
        members[micro_batch] = tuple(
            replace(one, num_targets=0) if one.row == row and begin <= one.begin < end else one
            for one in members[micro_batch]
        )
    return replace(plan, labels=tuple(labels), members=tuple(members))
