"""How sure the difference of two evaluations of the same questions is: a paired confidence interval.

The difference of a question's two scores is one observation. Its mean over n questions has the standard error
s / sqrt(n), with s the standard deviation of these differences; the interval of 95 % is 1.96 of it to either side.
Pairing takes out what is hard or easy about a question for both, so it is narrower than that of two independent means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_NORMAL_95: Final = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""
FEW: Final = 30
"""Below so many questions the normal distribution is a poor guide."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Second minus first, over the questions that both answered."""

    questions: int
    first: float
    """Mean score of the first."""
    second: float
    mean: float
    low: float
    """Lower end of the interval of 95 %."""
    high: float
    better: int
    """Questions with a higher score in the second."""
    worse: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval does not hold zero."""
        return self.questions > 1 and not self.low <= 0.0 <= self.high


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare scores of the same questions.

    Args:
        first: Scores of one evaluation, at least one.
        second: Scores of the other, in the same order.

    Returns:
        The difference; of a single question the interval is from minus to plus infinity.
    """
    number = len(first)
    changes = [new - old for old, new in zip(first, second, strict=True)]
    mean = sum(changes) / number
    half = math.inf
    if number > 1:
        variance = sum((change - mean) ** 2 for change in changes) / (number - 1)
        half = _NORMAL_95 * math.sqrt(variance / number)
    return Difference(
        questions=number,
        first=sum(first) / number,
        second=sum(second) / number,
        mean=mean,
        low=mean - half,
        high=mean + half,
        better=sum(change > 0 for change in changes),
        worse=sum(change < 0 for change in changes),
    )
