"""Evaluations of two runs side by side: differences with their paired intervals, and the questions that changed."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from megatron_deepstack.platform.quantity import number_of
from megatron_deepstack.report.drawing.frame import section, table
from megatron_deepstack.report.drawing.svg import Markup, element
from megatron_deepstack.report.evaluation_page import Thumbnails, shown_score
from megatron_deepstack.report.page import filter_box
from megatron_deepstack.scores.difference import FEW, Difference, paired_difference
from megatron_deepstack.scores.evaluation import Evaluation, Scored, read_evaluations
from megatron_deepstack.scores.metrics import METRICS

_MOST_CHANGED: Final = 200
"""Changed questions that are shown with their pictures."""

Pair = tuple[Scored, Scored]
"""The same question in the first and in the second evaluation."""


def evaluation_sections(runs: Sequence[tuple[str, Path]]) -> Iterator[Markup]:
    """A section for each evaluation that the first run has in common with another.

    Args:
        runs: Label and folder of each run; the first is compared with each of the others.

    Returns:
        The sections; none if no two runs have answered the same questions.

    Raises:
        DataError: An evaluation's files are damaged.
    """
    (first_label, first_folder), *others = runs
    first = {one.name: one for one in read_evaluations(first_folder)}
    for label, folder in others:
        for second in read_evaluations(folder):
            if second.name in first:
                title = f"Evaluation {second.name}: {first_label} and {label}"
                yield section(title, *_comparison(first[second.name], second, first_label, label))


def common_questions(first: Evaluation, second: Evaluation) -> list[Pair]:
    """The questions of both that ask the same: same id, same text, same known answers.

    Ids may repeat in a store. Questions that are alike in all three are taken in the order in which they were asked.

    Args:
        first: One evaluation.
        second: The other, whose order the result has.

    Returns:
        Each question as it is in the first, and in the second.
    """
    known: dict[tuple[str, str, tuple[str, ...]], deque[Scored]] = defaultdict(deque)
    for old in first.answers:
        known[old.id, old.question, old.references].append(old)
    alike = [(known[new.id, new.question, new.references], new) for new in second.answers]
    return [(waiting.popleft(), new) for waiting, new in alike if waiting]


def asked_differently(first: Evaluation, second: Evaluation) -> str:
    """A warning if two evaluations of the same name were not of the same questions; empty if they were.

    Args:
        first: One evaluation.
        second: The other.
    """
    prints = (first.fingerprint, second.fingerprint)
    if None in prints or prints[0] == prints[1]:
        return ""
    return (
        f"Evaluation {first.name}: the questions differ: those of {first.source} have the fingerprint "
        f"{str(prints[0])[:12]}, those of {second.source} {str(prints[1])[:12]}. Only questions that both asked alike "
        "are compared."
    )


def differences(pairs: Sequence[Pair]) -> dict[str, Difference]:
    """The differences of two evaluations.

    Args:
        pairs: The questions that they have in common.

    Returns:
        Of each metric that both have, the difference over the questions for which it is defined.
    """
    found = {}
    for metric in METRICS:
        both = [(old.scores[metric], new.scores[metric]) for old, new in pairs if metric in old.scores]
        if both:
            found[metric] = paired_difference([old for old, _ in both], [new for _, new in both])
    return found


def in_words(difference: Difference) -> str:
    """The difference with its interval, such as `+2.5 points, 95 % interval +0.4 to +4.6: clear`."""
    if math.isinf(difference.low):
        return f"{100 * difference.mean:+.1f} points; one question has no interval"
    verdict = "clear" if difference.is_clear else "within chance"
    few = f"; few questions (below {FEW}), so the interval is rough" if difference.questions < FEW else ""
    return (
        f"{100 * difference.mean:+.1f} points, 95 % interval {100 * difference.low:+.1f} to "
        f"{100 * difference.high:+.1f}: {verdict}{few}"
    )


def _comparison(first: Evaluation, second: Evaluation, one: str, other: str) -> Iterator[Markup]:
    pairs = common_questions(first, second)
    left_out = len(first.answers) + len(second.answers) - 2 * len(pairs)
    steps = " and ".join("unknown" if step is None else str(step) for step in (first.step, second.step))
    yield element("p", f"Steps {steps}; {number_of(len(pairs), 'question')} in common.")
    if warning := asked_differently(first, second):
        yield element("p", element("strong", warning))
    if left_out:
        yield element("p", f"{number_of(left_out, 'question')} left out: only one of both asked them so.")
    rows = [
        (
            metric.replace("_", " "),
            f"{found.questions}",
            f"{found.first:.1%}",
            f"{found.second:.1%}",
            in_words(found),
            f"{found.better}",
            f"{found.worse}",
        )
        for metric, found in differences(pairs).items()
    ]
    if rows:
        yield table(("metric", "questions", one, other, "difference (paired)", "better", "worse"), rows)
    yield from _changed(pairs, one, other)


def _changed(pairs: Sequence[Pair], one: str, other: str) -> Iterator[Markup]:
    changed = sorted((pair for pair in pairs if pair[0].answer != pair[1].answer), key=lambda pair: _gain(*pair))
    yield element("h3", f"changed answers: {len(changed)}")
    if not changed:
        return
    yield filter_box(("worse", "better", "same score"))
    pictures, listed = Thumbnails(), changed[:_MOST_CHANGED]
    rows = [
        (
            pictures.of(new),
            new.id,
            new.question,
            old.answer,
            new.answer,
            " | ".join(dict.fromkeys(new.references)),
            shown_score(_mean(old)),
            shown_score(_mean(new)),
        )
        for old, new in listed
    ]
    kinds = [("worse" if _gain(*pair) < 0 else "better" if _gain(*pair) > 0 else "same score") for pair in listed]
    head = ("picture", "id", "question", one, other, "expected", f"score of {one}", f"score of {other}")
    yield table(head, rows, sortable=True, kinds=kinds)
    if len(listed) < len(changed):
        yield element("p", f"The first {len(listed)} of {len(changed)} are listed, the greatest losses first.")
    for line in pictures.told():
        yield element("p", line)


def _mean(scored: Scored) -> float | None:
    return sum(scored.scores.values()) / len(scored.scores) if scored.scores else None


def _gain(old: Scored, new: Scored) -> float:
    return (_mean(new) or 0.0) - (_mean(old) or 0.0)
