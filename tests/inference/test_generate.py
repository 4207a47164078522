"""Answers do not depend on the layout, and the score says what guessing gives."""

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
from megatron_deepstack.config.choices import EncoderPlacement
from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import CheckpointError, StoreError
from megatron_deepstack.inference import launch
from megatron_deepstack.inference.generate import Method
from megatron_deepstack.inference.loading import require_checkpoint
from megatron_deepstack.inference.main import open_questions
from megatron_deepstack.inference.questions import read_question
from megatron_deepstack.inference.sampling import GREEDY, Sampling
from megatron_deepstack.run_folder.answers import Answer, Score, read_answer_sets, read_answers
from megatron_deepstack.testing.ranks import RankPool, groups_for
from orchestration.preprocess.driver.run import preprocess

Pools = Callable[[int], RankPool]
NEW_TOKENS = 12


def train_and_answer(rank: int, recipe: Recipe, parallel: ParallelConfig, changes: dict[str, Any]) -> list[list[int]]:
    """Train in the recipe's layout, then answer in another; `changes` are of `Writing`."""
    from megatron_deepstack.inference.generate import Writing, generate_answers
    from megatron_deepstack.inference.loading import load_engine

    train_two_steps(rank, recipe)
    assert recipe.data.store is not None
    store, tokenizer = open_questions(recipe, recipe.data.store)
    engine = load_engine(replace(recipe, parallel=parallel), groups_for(parallel))
    questions = [read_question(store, index, tokenizer) for index in range(4)]
    size = changes.pop("batch", 2)
    batches = [questions[first : first + size] for first in range(0, 4, size)]
    writing = Writing(max_new_tokens=NEW_TOKENS, stop_ids=(510,), **changes)
    return [ids for batch in generate_answers(engine, store, batches, writing) for ids in batch]


def answer_by_generate(rank: int, recipe: Recipe) -> list[Answer]:
    """As the verb does, after training."""
    from megatron_deepstack.inference.loading import load_engine
    from megatron_deepstack.inference.main import answer_questions

    train_two_steps(rank, recipe)
    assert recipe.data.store is not None
    store, tokenizer = open_questions(recipe, recipe.data.store)
    engine = load_engine(recipe, groups_for(recipe.parallel))
    return answer_questions(recipe, engine, store, tokenizer, recipe.data.store, None, 5)


ONE, SAMPLED = ParallelConfig(), Sampling(temperature=1.5, top_p=0.9, seed=3)
LAYOUTS = {
    "two stages": (2, ParallelConfig(pipeline=2), {}),
    "two stages, each of two chunks": (2, ParallelConfig(pipeline=2, virtual_pipeline=2), {}),
    "tensor parallel": (2, ParallelConfig(tensor=2), {}),
    "tensor and sequence parallel": (2, ParallelConfig(tensor=2, sequence_parallel=True), {}),
    "context parallel": (2, ParallelConfig(context=2), {}),
    "encoder in the first stage": (1, ParallelConfig(encoder_placement=EncoderPlacement.INLINE), {}),
    "one question at a time": (1, ONE, {"batch": 1}),
    "all questions at once": (1, ONE, {"batch": 4}),
    "prompt read in pieces": (1, ONE, {"prefill_tokens": 14}),
    "prompt read token by token": (1, ONE, {"prefill_tokens": 1}),
    "prompt read in pieces by two stages": (2, ParallelConfig(pipeline=2), {"prefill_tokens": 10}),
}
QUICK = {
    "two stages, each of two chunks",
    "tensor and sequence parallel",
    "one question at a time",
    "all questions at once",
    "prompt read in pieces by two stages",
}


@pytest.fixture(scope="module")
def computed_again(ranks: Pools, recipe: Recipe) -> dict[Sampling, list[list[int]]]:
    """The reference: the whole sequence for each token, as training computes it."""
    ranks(2).run(train_two_steps, recipe)
    slow = {"method": Method.RECOMPUTED}
    return {
        sampling: ranks(1).run(train_and_answer, recipe, ONE, {**slow, "sampling": sampling})[0]
        for sampling in (GREEDY, SAMPLED)
    }


def test_the_reference_is_no_trivial_text(computed_again: dict[Sampling, list[list[int]]]) -> None:
    greedy, drawn = computed_again.values()
    assert [len(ids) for ids in greedy] == [NEW_TOKENS] * 4
    assert len({tuple(ids) for ids in greedy}) == 4
    assert all(ids != other for ids, other in zip(greedy, drawn, strict=True))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in LAYOUTS]
)
def test_the_cache_gives_the_text_of_whole_sequences(
    ranks: Pools, recipe: Recipe, computed_again: dict[Sampling, list[list[int]]], name: str
) -> None:
    """Greedy and drawn, for every layout, batch and piece; the prompts of a batch differ in length."""
    num_ranks, parallel, changes = LAYOUTS[name]
    for sampling, expected in computed_again.items():
        for found in ranks(num_ranks).run(train_and_answer, recipe, parallel, {**changes, "sampling": sampling}):
            assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=2, context=2, sequence_parallel=True),
        ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True),
        ParallelConfig(pipeline=2, context=2),
    ],
    ids=["tensor x context", "tensor x pipeline", "pipeline x context"],
)
def test_two_axes_at_once(
    ranks: Pools, recipe: Recipe, computed_again: dict[Sampling, list[list[int]]], parallel: ParallelConfig
) -> None:
    for sampling, expected in computed_again.items():
        for found in ranks(4).run(train_and_answer, recipe, parallel, {"sampling": sampling}):
            assert found == expected


def test_generate_answers_all_questions_of_a_store(ranks: Pools, recipe: Recipe) -> None:
    answers = ranks(2).run(answer_by_generate, recipe)[0]
    assert [answer.expected for answer in answers] == list(ANSWERS)
    one_rank = replace(recipe, parallel=ONE)
    assert ranks(1).run(answer_by_generate, one_rank)[0] == answers


@pytest.mark.slow
def test_questions_in_a_bucket_are_answered_and_reported(
    ranks: Pools, recipe: Recipe, bucket: str, tmp_path: Path
) -> None:
    """By the command line, with copies where data.cache_dir says; the report finds the store again by its URL.

    The run's held-out answers stay, stdout holds one JSON document, and stderr says what is done.
    """
    held_out = Path(recipe.run_dir) / "answers.jsonl"
    ranks(2).run(train_two_steps, recipe)
    url = f"{bucket}/store.zarr"
    preprocess(recipe, url, workers=0)
    changes = [f"data.cache_dir={tmp_path / 'cache'}", "parallel.pipeline=1"]
    held_out.write_text('{"id": "0", "question": "?", "answer": "a", "expected": "a", "correct": true}\n')
    asked = CliRunner().invoke(app, ["generate", recipe.run_dir, *changes, "--store", url, "--limit", "1", "--json"])
    assert asked.exit_code == 0, asked.output
    document = json.loads(asked.stdout)
    assert f"generate: 1 question of {url} in 1 process" in asked.stderr
    result = CliRunner().invoke(app, ["report", recipe.run_dir])
    assert result.exit_code == 0, result.output
    first, second = read_answer_sets(Path(recipe.run_dir))
    assert [answer.id for answer in read_answers(Path(recipe.run_dir))] == ["0"] == [a.id for a in first.answers]
    (answer,) = second.answers
    assert answer.store == url
    assert (document["answers_file"], document["answers"][0]["answer"]) == (str(second.file), answer.answer)
    assert set(document) == {"run", "step", "fingerprint", "store", "answers_file", "score", "answers"}
    held_out.unlink()
    assert any((tmp_path / "cache/copies").iterdir())
    assert "global view" in (Path(recipe.run_dir) / "report.html").read_text(encoding="utf-8")


def test_what_was_asked_and_answered_is_shown_as_it_is(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ("Is it [/b]?", "[bold]", "1:100:3")
    monkeypatch.setattr(launch, "launch_ranks", lambda *_, **__: [Answer("0", *texts, False, "s", None)])
    monkeypatch.setattr(launch, "require_checkpoint", lambda _: None)
    launch.show(launch.generate(recipe, held_out=None, store=recipe.data.store, limit=None, max_new_tokens=5))
    shown = capsys.readouterr().out
    assert [text for text in texts if text not in shown] == []


def test_questions_of_a_store(recipe: Recipe) -> None:
    assert recipe.data.store is not None
    assert recipe.data.tokenizer is not None
    question = read_question(Store.open(recipe.data.store), 0, load_tokenizer(recipe.data.tokenizer))
    assert (question.text, question.expected, question.images) == ("What is it?", "A photo.", (0,))


def test_chance_is_the_commonest_answer() -> None:
    answers = [Answer(str(n), "q", "A photo.", text, text == "A photo.", "s", None) for n, text in enumerate(ANSWERS)]
    assert Score.of(answers) == Score(correct=2, total=5, chance=0.4)


def test_what_is_missing_is_said_before_ranks_start(recipe: Recipe, tmp_path: Path) -> None:
    """No checkpoint, and a store of another tokenizer."""
    with pytest.raises(CheckpointError, match="holds no checkpoint; run `train` first"):
        require_checkpoint(replace(recipe, run_dir=str(tmp_path)))
    other = tmp_path / "other.model"
    other.write_bytes(Path(str(recipe.data.tokenizer)).read_bytes() + b"\x1a\x00")
    assert recipe.data.store is not None
    with pytest.raises(StoreError, match="its tokenizer had"):
        open_questions(replace(recipe, data=replace(recipe.data, tokenizer=str(other))), recipe.data.store)
