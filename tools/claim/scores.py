"""Scores of arms with intervals over seeds and samples, and the differences that the paper's findings are about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.claim.pages import FINE_KINDS

_DRAWS = 2000
Scores = np.ndarray
"""float64 (seeds, samples)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def exact(answer: Mapping[str, str]) -> float:
    """1 if the answer is the expected text, else 0."""
    return float(answer["answer"] == answer["expected"])


def characters(answer: Mapping[str, str]) -> float:
    """Share of places, of the longer of both texts, at which they have the same character."""
    given, expected = answer["answer"], answer["expected"]
    same = sum(left == right for left, right in zip(given, expected, strict=False))
    return same / max(len(given), len(expected), 1)


def scores(results: Sequence[Mapping[str, Any]], score: Callable[[Mapping[str, str]], float], *kinds: str) -> Scores:
    """Score the test answers of an arm.

    Args:
        results: The arm's results, one for each seed.
        score: Score of one answer.
        kinds: Kinds of document that count.

    Returns:
        The scores, a row for each seed; column j is the same page in every row and for every arm.
    """
    return np.array([[score(answer) for answer in one["test"] if answer["kind"] in kinds] for one in results])


def estimate(values: Scores) -> Estimate:
    """Estimate the mean, by a bootstrap that draws seeds and samples anew (Davison & Hinkley 1997, section 3.8)."""
    return _interval(values, values.mean())


def difference(first: Scores, second: Scores) -> Estimate:
    """Estimate by how much the first mean is above the second, on the same samples (paired)."""
    num = min(len(first), len(second))
    values = first[:num] - second[:num]
    return _interval(values, values.mean())


def _interval(values: Scores, mean: float) -> Estimate:
    generator = np.random.default_rng(0)
    seeds = generator.integers(0, values.shape[0], (_DRAWS, values.shape[0]))
    samples = generator.integers(0, values.shape[1], (_DRAWS, values.shape[1]))
    means = [values[np.ix_(one, some)].mean() for one, some in zip(seeds, samples, strict=True)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(mean), float(low), float(high))


def tuned_rate(results: Sequence[Mapping[str, Any]]) -> float:
    """Return the learning rate with the best exact match on the pages for tuning; the smaller one of equals.

    Args:
        results: Results of one arm with one seed, at several rates.
    """

    def key(result: Mapping[str, Any]) -> tuple[float, float]:
        right = [exact(answer) for answer in result["tune"] if answer["kind"] in FINE_KINDS]
        return float(np.mean(right)), -float(result["learning_rate"])

    return float(max(results, key=key)["learning_rate"])
