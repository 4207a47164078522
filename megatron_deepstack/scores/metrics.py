"""Metrics of one answer against its references, each from 0 to 1.

    exact_match       equal to a reference, apart from white space at the ends
    vqa_accuracy      VQA challenge (Antol et al., 2015): min(1, people who agree / 3), averaged over leaving out one
    anls              average normalised Levenshtein similarity (Biten et al., 2019), cut off below 0.5
    relaxed_accuracy  ChartQA (Masry et al., 2022; Methani et al., 2020): numbers may be off by 5 %, words may not

Their values are those of lmms-eval's functions for VQAv2, DocVQA and ChartQA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from megatron_deepstack.scores.vqa_words import normalised

_AGREEING: Final = 3
"""People who have to give an answer for it to be completely right."""
_LEAST_SIMILARITY: Final = 0.5
_TOLERANCE: Final = 0.05

Metric = Callable[[str, Sequence[str]], float | None]
"""An answer and its references to a score; None where the metric is not defined for such references."""


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Whether the answer equals a reference, apart from white space at the ends.

    Args:
        answer: The model's answer.
        references: Answers that count as right.

    Returns:
        1 or 0.
    """
    return float(any(answer.strip() == reference.strip() for reference in references))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float | None:
    """The VQA challenge's accuracy.

    Args:
        answer: The model's answer.
        references: What people answered, one entry per person; ten in the challenge.

    Returns:
        The mean over all people of min(1, others who gave the answer / 3); None for less than four people, among whom
        no answer could be completely right.
    """
    if len(references) <= _AGREEING:
        return None
    ours, theirs = normalised(answer), [normalised(reference) for reference in references]
    agreeing = theirs.count(ours)
    return sum(min(1.0, (agreeing - (one == ours)) / _AGREEING) for one in theirs) / len(theirs)


def anls(answer: str, references: Sequence[str]) -> float:
    """Similarity to the nearest reference: 1 - edit distance / length of the longer text.

    Args:
        answer: The model's answer. Upper case and repeated white space do not matter.
        references: Answers that count as right, at least one.

    Returns:
        From 0.5 to 1; 0 if no reference is at least half similar.
    """
    nearest = min(_distance(answer, reference) for reference in references)
    return 1.0 - nearest if 1.0 - nearest >= _LEAST_SIMILARITY else 0.0


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """Whether the answer is a reference's number within 5 %, or else its text in lower case.

    Args:
        answer: The model's answer; `7`, `7.0` and `700%` are the same number.
        references: Answers that count as right. One that is 0 or no number must be met as a text.

    Returns:
        1 or 0.
    """
    return float(any(_nearly_equal(answer, reference) for reference in references))


METRICS: Final[Mapping[str, Metric]] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
}
"""All metrics by name, in the order in which they are shown."""


def scores_of(answer: str, references: Sequence[str]) -> dict[str, float]:
    """All metrics that are defined for these references.

    Args:
        answer: The model's answer.
        references: Answers that count as right; there may be none.

    Returns:
        Scores from 0 to 1 by the name of the metric; empty without references.
    """
    found = {name: metric(answer, references) for name, metric in METRICS.items()} if references else {}
    return {name: value for name, value in found.items() if value is not None}


def _distance(answer: str, reference: str) -> float:
    """Edit distance over the length of the longer text, of texts in lower case with single spaces."""
    longest = max(len(answer), len(reference))
    if not longest:
        return 0.0
    return edit_distance(" ".join(answer.lower().split()), " ".join(reference.lower().split())) / longest


def edit_distance(first: str, second: str) -> int:
    """The Levenshtein distance (1966) of two texts.

    Args:
        first: A text.
        second: Another one; their order does not matter.

    Returns:
        The least number of characters to insert, delete or replace to turn one into the other.
    """
    row = list(range(len(second) + 1))
    for number, character in enumerate(first, start=1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(second, start=1):
            changed = diagonal + (character != other)
            diagonal = row[place]
            row[place] = min(changed, row[place] + 1, row[place - 1] + 1)
    return row[-1]


def _nearly_equal(answer: str, reference: str) -> bool:
    found, wanted = _number(answer), _number(reference)
    if found is not None and wanted:
        return abs(found - wanted) / abs(wanted) <= _TOLERANCE
    return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None
