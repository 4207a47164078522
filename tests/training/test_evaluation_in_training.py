"""Questions asked while a run trains: training stays the same bit for bit, and a stop changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import ANSWERS, make_run

from megatron_deepstack.checkpoint.folder import checkpoint_path
from megatron_deepstack.config.choices import Batching, ScoreMetric
from megatron_deepstack.config.schema import EvaluationConfig, ParallelConfig, Recipe
from megatron_deepstack.errors import DeepStackError, PreemptedError
from megatron_deepstack.report.page import page
from megatron_deepstack.scores.evaluation import read_evaluations
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.training.evaluation import Examination

Pools = Callable[[int], RankPool]
STEPS = 4


def train_here(rank: int, recipe: Recipe, stop_after: int | None = None) -> None:
    from megatron_deepstack.training.loop import run

    groups = groups_for(recipe.parallel)
    torch.manual_seed(0)  # a rank of a pool has run before
    run(recipe, groups, stop_after)


def ask_to_stop(rank: int, recipe: Recipe, call: int) -> str:
    """Train until rank 1 is asked to stop, from the given time on that it looks; what the run ends with."""
    from megatron_deepstack.training.loop import run

    groups, looks = groups_for(recipe.parallel), count(1)
    torch.manual_seed(0)
    with pytest.raises(PreemptedError) as stopped:
        run(recipe, groups, asked=lambda: next(looks) >= call and rank == 1)
    return str(stopped.value)


def evaluate_saved(rank: int, recipe: Recipe) -> list[Any]:
    """What `evaluate` says of the run's newest checkpoint."""
    from megatron_deepstack.inference.answerer import RunAnswerer
    from megatron_deepstack.inference.evaluate.exam import Questions, open_exam
    from megatron_deepstack.inference.evaluate.rank import evaluate_exam

    answerer = RunAnswerer(recipe)
    opened = open_exam(answerer, Questions(store=recipe.data.store), "evaluate", print)
    engine, _ = answerer.engine(groups_for(recipe.parallel))
    return evaluate_exam(engine, opened.exam, opened.tokenizer, opened.template, 5)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    run = make_run(tmp_path_factory.mktemp("asked"))
    return replace(run, train=replace(run.train, steps=STEPS))


def asking(recipe: Recipe, run_dir: Path, **changes: Any) -> Recipe:
    """The run with questions every two steps, those of its own store."""
    asked = EvaluationConfig(interval=2, store=recipe.data.store, max_new_tokens=5)
    return replace(recipe, run_dir=str(run_dir), evaluation=replace(asked, **changes))


def records_of(run_dir: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def learned(run_dir: str | Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["gradient_norm"]) for record in records_of(run_dir)]


LAYOUTS = {
    "pipeline": ParallelConfig(pipeline=2),
    "interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "replicas": ParallelConfig(distributed_optimizer=True, overlap_grad_reduce=True),
    "sequence": ParallelConfig(tensor=2, sequence_parallel=True),
    "context": ParallelConfig(context=2),
}


@pytest.mark.parametrize(
    "layout",
    [
        "replicas",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("pipeline", "interleaved", "sequence", "context")),
    ],
)
def test_training_stays_the_same(ranks: Pools, recipe: Recipe, tmp_path: Path, layout: str) -> None:
    """Losses, gradients, weights and random states, bit for bit; and the answers are those of `evaluate` afterwards."""
    parallel = LAYOUTS[layout]
    train = replace(recipe.train, batching=Batching.PACKED, micro_batch_size=1)
    plain = replace(recipe, parallel=parallel, train=train, run_dir=str(tmp_path / "plain"))
    asked = asking(plain, tmp_path / "asked")
    for one in (plain, asked):
        ranks(2).run(train_here, one)
    assert learned(asked.run_dir) == learned(plain.run_dir)
    weights = [sorted(checkpoint_path(one.run_dir, STEPS).glob("*.distcp")) for one in (plain, asked)]
    assert [file.read_bytes() for file in weights[0]] == [file.read_bytes() for file in weights[1]]
    scores = [record["evaluation"] for record in records_of(asked.run_dir)]
    assert [sorted(one) for one in scores] == [[], ["anls", "exact_match", "relaxed_accuracy"]] * 2
    second, last = read_evaluations(asked.run_dir)
    assert [one.name for one in (second, last)] == ["store-step-00000002", "store-step-00000004"]
    assert [one.step for one in (second, last)] == [2, 4]
    assert [scored.references for scored in last.answers] == [(answer,) for answer in ANSWERS]
    assert scores[3] == last.means()
    flat = replace(asked, parallel=replace(parallel, sequence_parallel=False))
    assert list(last.answers) == ranks(2).run(evaluate_saved, flat)[0]


def test_a_stop_changes_nothing(ranks: Pools, recipe: Recipe, tmp_path: Path) -> None:
    """A run that ends where questions are due, and goes on; its records and evaluations are those of one without."""
    whole, parts = asking(recipe, tmp_path / "whole"), asking(recipe, tmp_path / "parts")
    ranks(2).run(train_here, whole)
    for stop_after in (2, None):
        ranks(2).run(train_here, parts, stop_after)
    told = [[(r["loss"], r["evaluation"]) for r in records_of(one.run_dir)] for one in (whole, parts)]
    assert told[0] == told[1]
    assert read_evaluations(whole.run_dir) == read_evaluations(parts.run_dir)
    board = EventAccumulator(str(tmp_path / "whole" / "tensorboard")).Reload()
    drawn = [(event.step, event.value) for event in board.Scalars("evaluation/anls")]
    assert drawn == [
        (step, pytest.approx(record["evaluation"]["anls"]))
        for step, record in enumerate(records_of(whole.run_dir), start=1)
        if record["evaluation"]
    ]
    drawn_page = page(Path(whole.run_dir))
    for words in ("Scores by step", "best exact match of questions during training", "store-step-00000004"):
        assert words in drawn_page


@pytest.mark.parametrize("layout", ["replicas", pytest.param("pipeline", marks=pytest.mark.slow)])
@pytest.mark.parametrize("measured", ["evaluation", "validation"])
def test_a_stop_leaves_out_the_rest_of_what_is_measured(
    ranks: Pools, recipe: Recipe, tmp_path: Path, layout: str, measured: str
) -> None:
    """A rank looks once in each step, and then before each part of what is measured after it: here after step 2."""
    run = replace(asking(recipe, tmp_path), parallel=LAYOUTS[layout])
    if measured == "validation":
        train = replace(recipe.train, validation_interval=2)
        data = replace(recipe.data, validation_store=recipe.data.store)
        run = replace(run, evaluation=EvaluationConfig(), train=train, data=data)
    ended = ranks(2).run(ask_to_stop, run, 3)
    assert all("saved after step 2 of 4" in one for one in ended)
    assert not read_evaluations(run.run_dir)
    ranks(2).run(train_here, run)
    records = records_of(run.run_dir)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [one["validation_loss"] is not None for one in records] == [False, False, False, measured == "validation"]
    assert [bool(one["evaluation"]) for one in records] == [False, False, False, measured == "evaluation"]


def test_a_file_of_questions_is_asked(ranks: Pools, recipe: Recipe, tmp_path: Path) -> None:
    """Every step, the first two questions alone; one has a picture that is not there."""
    photo = str(sorted(Path(str(recipe.data.images)).iterdir())[0])
    lines = [
        {"question_id": "a", "image": photo, "text": "What is it?", "answers": ["A photo."] * 10},
        {"question_id": "b", "image": "gone.png", "text": "What is it?", "answers": ["A photo."] * 10},
        {"question_id": "c", "text": "Hello?", "answers": ["Hello."]},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    file = str(tmp_path / "questions.jsonl")
    metric = ScoreMetric.VQA_ACCURACY
    asked = asking(recipe, tmp_path / "run", interval=3, store=None, file=file, limit=2, metric=metric)
    ranks(2).run(train_here, asked)
    made = read_evaluations(asked.run_dir)
    assert [one.name for one in made] == ["questions-first-2-step-00000003", "questions-first-2-step-00000004"]
    assert [one.id for one in made[0].answers] == ["a", "b"]
    assert "gone.png: no such file" in str(made[0].answers[1].error)
    told = Examination(asked, engine=None, opened=None).told(made[0])  # type: ignore[arg-type]
    assert told == f"evaluation after step 3: vqa accuracy {made[0].means()['vqa_accuracy']:.1%}, 2 questions"


def test_unusable_questions_are_named_before_training(ranks: Pools, recipe: Recipe, tmp_path: Path) -> None:
    from megatron_deepstack.training.session import check_data

    with pytest.raises(DeepStackError, match=r"nowhere\.zarr: no such folder"):
        check_data(asking(recipe, tmp_path, store=str(tmp_path / "nowhere.zarr")))
    with pytest.raises(DeepStackError, match=r"nowhere\.jsonl: cannot be read"):
        check_data(asking(recipe, tmp_path, store=None, file=str(tmp_path / "nowhere.jsonl")))
