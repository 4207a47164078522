"""Which of the paper's findings appear at this size: each is a difference between two arms, with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tools.claim.scores import Estimate, Scores, difference

MARGIN = 0.05
"""Two arms within five points of exact match are called close."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A statement of the paper about two arms."""

    statement: str
    first: str
    second: str
    is_above: bool
    """The first arm is above the second one; else it is at most `MARGIN` away from it, or not above it by more."""
    may_be_above: bool = True
    """For a comparison of closeness: whether more than `MARGIN` above also agrees with the statement."""


FINDINGS = (
    Finding("DeepStack-L is above the baseline at equal context (Table 1)", "L, 4 stacks", "no stacks", True),
    Finding("More stacks are better: four above two (Figure 3)", "L, 4 stacks", "L, 2 stacks", True),
    Finding("More stacks are better: two above one (Figure 3)", "L, 2 stacks", "L, 1 stack", True),
    Finding("Dummy stacks are no better than the baseline (Table 6)", "dummy stacks", "no stacks", False, False),
    Finding("Sampling 2d is at least as good as 1d (Table 5)", "L, 4 stacks", "sampler 1d", False),
    Finding("Sampling 2d is at least as good as grid (Table 5)", "L, 4 stacks", "sampler grid", False),
    Finding(
        "DeepStack-L is close to all tokens in sequence, at a fifth of the context",
        "L, 4 stacks",
        "all in sequence",
        False,
    ),
    Finding("DeepStack-V is above the baseline (Table 1)", "V, 4 stacks", "no stacks", True),
    Finding(
        "Stacks over layers are above stacks summed at the embedding", "L, 4 stacks", "summed at the embedding", True
    ),
    Finding("Early layers are better than late ones (Figure 3)", "L, 4 stacks", "start at layer 2", True),
)
"""The findings that are looked for; tables and figures are those of arXiv 2406.04334."""


def judge(finding: Finding, scores: Mapping[str, Scores]) -> tuple[Estimate, str] | None:
    """Measure a finding.

    Args:
        finding: The finding.
        scores: Exact match of each arm on the fine kinds.

    Returns:
        The difference of its arms and a verdict in words; None if an arm is missing.
    """
    if finding.first not in scores or finding.second not in scores:
        return None
    found = difference(scores[finding.first], scores[finding.second])
    if finding.is_above:
        verdict = "appears" if found.low > 0 else "the opposite appears" if found.high < 0 else "is not decided here"
    else:
        too_low = finding.may_be_above and found.low < -MARGIN
        too_high = not finding.may_be_above and found.high > MARGIN
        against = found.high < -MARGIN if finding.may_be_above else found.low > MARGIN
        verdict = "does not appear" if against else "is not decided here" if too_low or too_high else "appears"
    return found, verdict
