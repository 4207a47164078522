"""Evaluations: the same answers and scores however replicas divide the questions of stores and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import ANSWERS, train_two_steps
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.schema import DataConfig, ParallelConfig, Recipe
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import ConfigError, LayoutError
from megatron_deepstack.inference.answerer import RunAnswerer
from megatron_deepstack.inference.ask.preparation import Preparation
from megatron_deepstack.inference.evaluate.exam import Exam, FileExam, Questions, StoreExam
from megatron_deepstack.inference.evaluate.launch import evaluate
from megatron_deepstack.inference.main import open_questions
from megatron_deepstack.inference.question_file import read_questions
from megatron_deepstack.scores.evaluation import Scored, read_evaluations
from megatron_deepstack.testing.ranks import RankPool, groups_for

Pools = Callable[[int], RankPool]


def evaluate_here(rank: int, recipe: Recipe, exam: Exam) -> list[Scored]:
    from megatron_deepstack.inference.evaluate.rank import evaluate_exam
    from megatron_deepstack.inference.loading import load_engine

    engine = load_engine(recipe, groups_for(recipe.parallel))
    return evaluate_exam(engine, exam, load_tokenizer(str(recipe.data.tokenizer)), "v1", 5)


def write_questions(folder: Path, recipe: Recipe) -> Path:
    """Three questions, of which the second has a picture that is not there."""
    photo = str(sorted(Path(str(recipe.data.images)).iterdir())[0])
    records: list[dict[str, Any]] = [
        {"question_id": "a", "image": photo, "text": "What is it?", "answers": ["A photo."], "category": "photos"},
        {"question_id": "b", "image": "gone.png", "text": "What is it?", "answers": ["A photo."] * 10},
        {"question_id": "c", "text": "Hello?"},
    ]
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return file


def test_replicas_divide_the_questions_of_a_store(ranks: Pools, recipe: Recipe) -> None:
    """One replica of two stages, one of one rank, and two of one rank each: five questions do not divide evenly."""
    ranks(2).run(train_two_steps, recipe)
    store, tokenizer = open_questions(recipe, str(recipe.data.store))
    exam, one = StoreExam(store, tokenizer, str(recipe.data.store)), replace(recipe, parallel=ParallelConfig())
    staged, *others = ranks(2).run(evaluate_here, recipe, exam)
    alone, both = ranks(1).run(evaluate_here, one, exam)[0], ranks(2).run(evaluate_here, one, exam)
    assert [scored.references for scored in staged] == [(answer,) for answer in ANSWERS]
    assert [staged, *others, alone, *both] == [staged] * 5


def test_a_question_that_cannot_be_asked_counts_as_wrong(ranks: Pools, recipe: Recipe, tmp_path: Path) -> None:
    ranks(2).run(train_two_steps, recipe)
    preparation = Preparation.of_run(recipe, load_tokenizer(str(recipe.data.tokenizer)), pytest.fail)
    exam = FileExam(preparation, tuple(read_questions(write_questions(tmp_path, recipe))))
    first, second, third = ranks(2).run(evaluate_here, replace(recipe, parallel=ParallelConfig()), exam)[0]
    assert (first.id, first.category, first.error) == ("a", "photos", None)
    assert set(first.scores) == {"exact_match", "anls", "relaxed_accuracy"}
    assert "gone.png: no such file" in str(second.error)
    assert second.scores == {"exact_match": 0.0, "vqa_accuracy": 0.0, "anls": 0.0, "relaxed_accuracy": 0.0}
    assert (third.scores, third.error) == ({}, None)


@pytest.mark.slow
def test_a_file_is_evaluated_by_the_command_line(ranks: Pools, recipe: Recipe, tmp_path: Path) -> None:
    """Two replicas; the files and the page."""
    ranks(2).run(train_two_steps, recipe)
    file = write_questions(tmp_path, recipe)
    arguments = ["evaluate", recipe.run_dir, "--file", str(file), "--ranks", "2", "parallel.pipeline=1"]
    result = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "4", "--name", "three", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["questions"], document["with_references"], document["not_asked"]) == (3, 2, 1)
    (made,) = [one for one in read_evaluations(recipe.run_dir) if one.name == "three"]
    assert [one.id for one in made.answers] == ["a", "b", "c"]
    page = (Path(document["folder"]) / "page.html").read_text(encoding="utf-8")
    assert "data:image/" in page
    assert "no picture for question b" in page


def test_what_is_missing_is_said_before_ranks_start(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    there = replace(recipe, run_dir=str(tmp_path))
    with pytest.raises(LayoutError, match=r"--ranks 3: no whole number of replicas .*give a multiple of 2"):
        evaluate(RunAnswerer(there), Questions(store=str(recipe.data.store)), max_new_tokens=4, ranks=3)
    with pytest.raises(ConfigError, match=r"data\.validation_store: not set; name questions with --store or --file"):
        evaluate(RunAnswerer(there), Questions(), max_new_tokens=4)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: not set; `evaluate` needs it"):
        evaluate(RunAnswerer(replace(there, data=DataConfig())), Questions(file=tmp_path / "q"), max_new_tokens=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "q", "--store", "s"], "--file q: found --store s beside it, expected only one of both"),
        (["--name", "../x"], "--name: found '../x', expected the name of a folder"),
        (["--name", ".."], "--name: found '..'"),
    ],
)
def test_options_that_do_not_go_together(recipe: Recipe, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", recipe.run_dir, *arguments])
    assert (result.exit_code, message in result.stderr) == (2, True), result.output
