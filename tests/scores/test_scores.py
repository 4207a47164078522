"""Metrics by hand, and equal to lmms-eval's functions where that package is installed."""

from __future__ import annotations

import math
import random

import pytest

from megatron_deepstack.config.choices import ScoreMetric
from megatron_deepstack.scores.difference import paired_difference
from megatron_deepstack.scores.metrics import (
    METRICS,
    anls,
    edit_distance,
    exact_match,
    relaxed_accuracy,
    scores_of,
    vqa_accuracy,
)
from megatron_deepstack.scores.vqa_words import normalised


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog.", "dog"),
        ("The  two\ndogs!", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("2.5 m", "2.5 m"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("isnt", "isn't"),
        ("couldnt've", "couldn't've"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("U.S.", "us"),
        ("an", ""),
    ],
)
def test_words_of_the_vqa_challenge(text: str, expected: str) -> None:
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_by_the_number_of_people_who_agree(agreeing: int, expected: float) -> None:
    """Of ten people k agree: (k min(1, (k - 1) / 3) + (10 - k) min(1, k / 3)) / 10."""
    people = ["A dog"] * agreeing + ["cat"] * (10 - agreeing)
    assert vqa_accuracy("dog.", people) == pytest.approx(expected)


def test_vqa_accuracy_needs_people_who_could_agree() -> None:
    assert vqa_accuracy("dog", ["dog"] * 3) is None
    assert vqa_accuracy("dog", ["dog"] * 4) == 1.0
    assert list(scores_of("dog", ["dog"])) == ["exact_match", "anls", "relaxed_accuracy"]
    assert scores_of("dog", []) == {}


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("Kitten", ["KITTEN "], 1.0),
        ("dog", ["cat"], 0.0),
        ("ab", ["ax"], 0.5),
        ("abc", ["axy"], 0.0),
        ("10 May", ["June", "10  may"], 1.0),
        ("", ["dog"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_anls(answer: str, references: list[str], expected: float) -> None:
    assert anls(answer, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("104", "100", 1.0),
        ("95", "100", 1.0),
        ("106", "100", 0.0),
        ("-100", "100", 0.0),
        ("50%", "0.5", 1.0),
        ("0.52", "50%", 1.0),
        ("Blue", "blue", 1.0),
        ("blues", "blue", 0.0),
        ("0", "0", 1.0),
        ("0.0", "0", 0.0),
        ("hundred", "100", 0.0),
    ],
)
def test_relaxed_accuracy(answer: str, reference: str, expected: float) -> None:
    """A reference of zero has no 5 %, so it is compared as text."""
    assert relaxed_accuracy(answer, ["none", reference]) == expected


def test_a_recipe_offers_all_metrics() -> None:
    assert tuple(ScoreMetric) == tuple(METRICS)


def test_exact_match() -> None:
    assert (exact_match(" dog\n", ["cat", "dog"]), exact_match("Dog", ["dog"])) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("first", "second", "distance"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
)
def test_edit_distance(first: str, second: str, distance: int) -> None:
    assert edit_distance(first, second) == edit_distance(second, first) == distance


def test_paired_difference_by_hand() -> None:
    """Differences 1, 0, 0, 1: mean 0.5, deviation sqrt(1 / 3), error sqrt(1 / 12), half width 1.96 of it."""
    found = paired_difference([0, 1, 0, 0], [1, 1, 0, 1])
    half = 1.959963984540054 * math.sqrt(1 / 12)
    assert (found.first, found.second, found.mean) == (0.25, 0.75, 0.5)
    assert (found.low, found.high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert (found.better, found.worse, found.is_clear) == (2, 0, False)


def test_a_difference_without_spread_or_of_one_question() -> None:
    same = paired_difference([0.0] * 5, [1.0] * 5)
    assert (same.low, same.high, same.is_clear) == (1.0, 1.0, True)
    one = paired_difference([0.0], [1.0])
    assert (one.low, one.high, one.is_clear) == (-math.inf, math.inf, False)


def test_the_interval_holds_the_true_difference_about_19_times_of_20() -> None:
    """500 experiments of 200 questions with a true gain of 0.1: a normal interval of so rare an event holds it in 93 %
    (a binomial sum); 0.035 are three standard errors of the share."""
    chance = random.Random(0)
    held = 0
    for _ in range(500):
        first = [float(chance.random() < 0.5) for _ in range(200)]
        second = [1.0 if chance.random() < 0.2 else old for old in first]
        found = paired_difference(first, second)
        held += found.low <= 0.1 <= found.high
    assert held / 500 == pytest.approx(0.93, abs=0.035)


def test_equal_to_lmms_eval() -> None:
    """In an environment that has lmms-eval; 40000 drawn answers were equal to those of its version 0.7.3."""
    metrics = pytest.importorskip("lmms_eval.api.metrics")
    words = pytest.importorskip("lmms_eval.tasks._task_utils.vqa_eval_metric").EvalAIAnswerProcessor()
    relaxed = pytest.importorskip("lmms_eval.tasks.chartqa.utils").relaxed_correctness
    for answer in ("A dog.", "2.5", "50%", "isnt it?", "1,000", "none", "U.S."):
        assert normalised(answer) == words.process_digit_article(words.process_punctuation(answer))
        for reference in ("dog", "2.4", "0.5", "isn't it", "1000", "0"):
            assert anls(answer, [reference]) == metrics.anls([reference], [answer])["anls"]
            assert relaxed_accuracy(answer, [reference]) == relaxed(answer, reference)
