"""One page about an evaluation: scores, and the questions with pictures and answers, sorted and filtered by score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from megatron_deepstack.data.images.pictures import decode_image
from megatron_deepstack.data.images.source import QuarantineError, read_image
from megatron_deepstack.data.location import Location
from megatron_deepstack.errors import DeepStackError
from megatron_deepstack.platform.quantity import number_of
from megatron_deepstack.report.drawing.chart import Charts
from megatron_deepstack.report.drawing.frame import document, section, table, write
from megatron_deepstack.report.drawing.svg import Markup, element
from megatron_deepstack.report.page import filter_box
from megatron_deepstack.report.pictures import Pictures, embedded
from megatron_deepstack.run_folder.answers import origin_of
from megatron_deepstack.scores.evaluation import PAGE, Evaluation, Scored
from megatron_deepstack.scores.metrics import METRICS

_MOST_ROWS: Final = 2000
"""Questions in the table, the lowest scores first."""
_MOST_PICTURES: Final = 200
"""Rows with pictures; a picture is about 10 kB of the page."""
_SIDE: Final = 112
"""Longest side of a picture on the page, in pixels."""
_MOST_PIXELS: Final = 50_000_000


def write_page(evaluation: Evaluation, folder: Path) -> Path:
    """Write the page into the evaluation's folder.

    Args:
        evaluation: The evaluation.
        folder: Its folder.

    Returns:
        The page's file.

    Raises:
        DataError: The file cannot be written.
    """
    return write(folder / PAGE, page(evaluation))


def page(evaluation: Evaluation) -> str:
    """The page's HTML."""
    origin = origin_of(evaluation.step, evaluation.fingerprint)
    facts = ", ".join(filter(None, (evaluation.source, number_of(len(evaluation.answers), "question"), origin)))
    return document(
        evaluation.name,
        Charts(),
        element("h1", evaluation.name),
        element("p", facts),
        section("Scores", _scores(evaluation)),
        section("Questions", *_questions(evaluation)),
    )


def shown_score(value: float | None) -> str:
    """A score with two decimals, such as 0.33; empty if there is none."""
    return "" if value is None else f"{value:.2f}"


def kind_of(scored: Scored) -> str:
    """The word by which the filter chooses: right, wrong, partly, or unknown."""
    if not scored.scores:
        return "unknown"
    best = max(scored.scores.values())
    return "right" if best == 1.0 else "wrong" if best == 0.0 else "partly"


def _scores(evaluation: Evaluation) -> Markup:
    means = evaluation.means()
    rows = []
    for category in (None, *evaluation.categories):
        scores = evaluation.means(category)
        number = sum(category is None or one.category == category for one in evaluation.answers)
        shown = [f"{scores[metric]:.1%}" if metric in scores else "" for metric in means]
        rows.append(("all" if category is None else category, str(number), *shown))
    return table(("questions", "number", *(metric.replace("_", " ") for metric in means)), rows)


def _questions(evaluation: Evaluation) -> Iterator[Markup]:
    ordered = sorted(evaluation.answers, key=lambda one: sum(one.scores.values()) / max(len(one.scores), 1))
    listed, pictures = ordered[:_MOST_ROWS], Thumbnails()
    yield element("p", "The lowest scores first; a click on a head sorts by its column.")
    yield filter_box(("wrong", "partly", "right", "unknown"))
    rows = [
        (
            pictures.of(one) if number < _MOST_PICTURES else Markup(),
            one.id,
            one.category,
            one.question,
            one.answer if one.error is None else f"({one.error})",
            " | ".join(dict.fromkeys(one.references)),
            *(shown_score(one.scores.get(metric)) for metric in METRICS),
        )
        for number, one in enumerate(listed)
    ]
    head = ("picture", "id", "category", "question", "answer", "expected", *(m.replace("_", " ") for m in METRICS))
    yield table(head, rows, sortable=True, kinds=[kind_of(one) for one in listed])
    if len(listed) < len(ordered):
        yield element("p", f"The {len(listed)} lowest of {len(ordered)} questions are listed.")
    for line in pictures.told():
        yield element("p", line)


class Thumbnails:
    """Small pictures of questions, from their store or their files. One that cannot be shown is left out and told."""

    def __init__(self) -> None:
        self._stores, self._absent = Pictures(), list[str]()

    def of(self, scored: Scored) -> Markup:
        """The first picture of a question; nothing for a question without one."""
        if scored.store is not None and scored.image is not None:
            return self._stores.global_view(scored.store, scored.image, _SIDE)
        if not scored.pictures:
            return Markup()
        try:
            return embedded(_pixels(scored.pictures[0]), "picture", _SIDE)
        except (QuarantineError, DeepStackError, OSError) as error:
            self._absent.append(f"no picture for question {scored.id}: {error}")
            return element("p", "no picture", class_="absent")

    def told(self) -> Sequence[str]:
        """A line about the pictures that are missing."""
        return [*self._stores.told(), *self._absent[:1]]


def _pixels(path: str) -> np.ndarray:
    """uint8 (height, width, 3), made small so that few are in memory."""
    pixels = decode_image(read_image(Location.parse(path), _MOST_PIXELS), _MOST_PIXELS).pixels
    small = Image.fromarray(pixels)
    small.thumbnail((2 * _SIDE, 2 * _SIDE))
    return np.asarray(small)
