"""Pages about one evaluation and about two: scores, pictures, what changed and how sure the difference is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.errors import DataError
from megatron_deepstack.report.compare import warnings, write_comparison
from megatron_deepstack.report.evaluation_page import kind_of, page
from megatron_deepstack.report.evaluations import common_questions, differences, in_words
from megatron_deepstack.scores.difference import paired_difference
from megatron_deepstack.scores.evaluation import (
    ANSWERS_FILE,
    Evaluation,
    Scored,
    evaluation_name,
    read_evaluations,
    replaced_source,
    require_writable,
    write_evaluation,
)
from megatron_deepstack.testing.tiny import tiny_recipe

ANSWERED = ("dog", "cat", "a\u2028bird", "<b>fish</b>")


def evaluation(answers: tuple[str, ...], pictures: tuple[str, ...] = ()) -> Evaluation:
    scored = tuple(
        Scored.of(answer, ("dog",), id=str(number), question=f"What is {number}?", pictures=pictures, category="pets")
        for number, answer in enumerate(answers)
    )
    return Evaluation(name="pets", source="pets.jsonl", step=7, answers=scored)


def test_an_evaluation_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = evaluation(ANSWERED)
    folder = write_evaluation(tmp_path, made)
    assert folder == tmp_path / "evaluations" / "pets"
    assert read_evaluations(tmp_path) == [made]
    assert made.document()["scores"] == {"exact_match": 0.25, "anls": 0.25, "relaxed_accuracy": 0.25}
    assert made.document()["categories"]["pets"] == made.means()


def test_answers_to_other_questions_are_not_replaced_without_a_word(tmp_path: Path) -> None:
    """Stores of the same name in different folders share the name of an evaluation."""
    assert replaced_source(tmp_path, "pets", "b") is None
    write_evaluation(tmp_path, replace(evaluation(ANSWERED), fingerprint="a"))
    assert replaced_source(tmp_path, "pets", "a") is None
    assert replaced_source(tmp_path, "pets", "b") == "pets.jsonl"


def test_whether_an_evaluation_can_be_written_is_tried_without_a_trace(tmp_path: Path) -> None:
    require_writable(tmp_path, "pets")
    assert list((tmp_path / "evaluations").iterdir()) == []
    (tmp_path / "evaluations" / "pets").write_text("in the way")
    with pytest.raises(DataError, match=r"evaluations/pets: the evaluation cannot be written: .*make it writable"):
        require_writable(tmp_path, "pets")


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path, evaluation(ANSWERED))
    (folder / ANSWERS_FILE).write_text("{}\n")
    with pytest.raises(DataError, match=r"evaluations/pets: cannot be read as an evaluation .*run `evaluate` again"):
        read_evaluations(tmp_path)


def test_evaluations_of_other_questions_are_warned_of(tmp_path: Path) -> None:
    """On the page and on the terminal; evaluations of earlier releases say nothing."""
    runs = [tmp_path / "one", tmp_path / "two"]
    prints = [("a" * 64, "b" * 64), ("a" * 64, "a" * 64), ("a" * 64, None)]
    for pair, expected in zip(prints, (1, 0, 0), strict=True):
        for run, fingerprint in zip(runs, pair, strict=True):
            run.mkdir(exist_ok=True)
            (run / "recipe.yaml").write_text(recipe_to_yaml(tiny_recipe()))
            write_evaluation(run, replace(evaluation(ANSWERED), fingerprint=fingerprint))
        assert len(warnings(runs)) == expected
        assert ("the questions differ" in write_comparison(runs).read_text()) is bool(expected)
    made = replace(evaluation(ANSWERED), fingerprint="c" * 64)
    assert "checkpoint after step 7, questions of fingerprint cccccccccccc" in page(made)
    assert "checkpoint" not in page(replace(made, step=None))


@pytest.mark.parametrize(
    ("source", "first", "step", "expected"),
    [
        ("data/held out.zarr/", None, None, "held-out"),
        ("s3://bucket/questions.jsonl", 20, None, "questions-first-20"),
        ("a.json", None, 120, "a-step-00000120"),
        ("...", None, None, "questions"),
    ],
)
def test_names(source: str, first: int | None, step: int | None, expected: str) -> None:
    assert evaluation_name(source, first, step) == expected


def test_the_page_shows_scores_pictures_and_text_as_it_is(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(picture)
    shown = page(evaluation(ANSWERED, (str(picture),)))
    assert shown.count("data:image/png;base64,") == 4
    assert "&lt;b&gt;fish&lt;/b&gt;" in shown
    assert shown.index("What is 1?") < shown.index("What is 0?"), "the lowest scores come first"
    assert 'data-kind="wrong"' in shown
    missing = page(evaluation(ANSWERED, (str(tmp_path / "gone.png"),)))
    assert "no picture for question 1: no such file" in missing


def test_kinds_for_the_filter() -> None:
    one = evaluation(("dog",)).answers[0]
    kinds = [kind_of(replace(one, scores=scores)) for scores in ({}, {"anls": 1.0}, {"anls": 0.6}, {"anls": 0.0})]
    assert kinds == ["unknown", "right", "partly", "wrong"]


def test_only_the_same_questions_are_compared() -> None:
    first, second = evaluation(ANSWERED), evaluation(("cat", "dog", "dog"))
    other = replace(second.answers[2], question="Another?")
    pairs = common_questions(first, replace(second, answers=(*second.answers[:2], other)))
    assert [(old.id, new.answer) for old, new in pairs] == [("0", "cat"), ("1", "dog")]
    assert differences(pairs)["exact_match"] == paired_difference([1.0, 0.0], [0.0, 1.0])


def test_questions_that_share_an_id_are_compared_one_by_one() -> None:
    """Ids may repeat in records, and so in a store of questions."""
    asked = replace(evaluation(("dog", "cat")).answers[0], id="x")
    first = replace(evaluation(()), answers=(asked, replace(asked, answer="cat"), replace(asked, question="Who?")))
    second = replace(first, answers=(first.answers[2], *first.answers[:2]))
    assert [(old.answer, new.answer) for old, new in common_questions(first, second)] == [
        ("dog", "dog"),
        ("dog", "dog"),
        ("cat", "cat"),
    ]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0.0] * 40, [1.0] * 39 + [0.0], "+97.5 points, 95 % interval +92.6 to +102.4: clear"),
        ([0.0, 1.0], [0.0, 1.0], "+0.0 points, 95 % interval +0.0 to +0.0: within chance; few questions (below 30)"),
        ([0.0], [1.0], "+100.0 points; one question has no interval"),
    ],
)
def test_differences_in_words(first: list[float], second: list[float], expected: str) -> None:
    assert in_words(paired_difference(first, second)).startswith(expected)


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    for name, answers in (("one", ANSWERED), ("two", ("dog", "dog", ANSWERED[2], "eel"))):
        run = tmp_path / name
        run.mkdir()
        text = recipe_to_yaml(replace(tiny_recipe(), name=name, run_dir=str(run)))
        (run / "recipe.yaml").write_text(text, encoding="utf-8")
        write_evaluation(run, evaluation(answers))
    text = write_comparison([tmp_path / "one", tmp_path / "two"]).read_text(encoding="utf-8")
    assert "Evaluation pets: one and two" in text
    assert "changed answers: 2" in text
    assert "+25.0 points, 95 % interval" in text
    assert "What is 3?" in text
    assert "What is 2?" not in text
