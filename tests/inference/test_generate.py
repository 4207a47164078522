"""Answers do not depend on the layout, and the score says what guessing gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.schema import DataConfig, LanguageConfig, ParallelConfig, Recipe
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import CheckpointError, StoreError
from megatron_deepstack.inference import launch
from megatron_deepstack.inference.main import open_questions, require_checkpoint
from megatron_deepstack.inference.questions import read_question
from megatron_deepstack.run_folder.answers import Answer, Score, read_answer_sets, read_answers
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_model, tiny_recipe
from megatron_deepstack.testing.tiny_data import record, write_photos, write_records, write_tokenizer
from orchestration.preprocess.driver.run import preprocess

Pools = Callable[[int], RankPool]
ANSWERS = ("A photo.", "A number.", "A photo.", "Three photos.", "No photo.")


def train_two_steps(rank: int, recipe: Recipe) -> None:
    """In the recipe's layout, if nothing is there yet."""
    from megatron_deepstack.training.loop import run

    if not (Path(recipe.run_dir) / "checkpoints").exists():
        run(recipe, groups_for(recipe.parallel))


def train_and_answer(rank: int, recipe: Recipe, parallel: ParallelConfig) -> list[Answer]:
    """Train in the recipe's layout, then answer in another."""
    from megatron_deepstack.inference.main import answer_questions, load_engine

    train_two_steps(rank, recipe)
    assert recipe.data.store is not None
    other = replace(recipe, parallel=parallel)
    store, tokenizer = open_questions(other, recipe.data.store)
    engine = load_engine(other, groups_for(parallel))
    return answer_questions(other, engine, store, tokenizer, recipe.data.store, None, 5)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("generate")
    names = write_photos(folder / "images", 4)
    records = [record(n, [names[n]] if n < 4 else [], answer=answer) for n, answer in enumerate(ANSWERS)]
    data = DataConfig(
        records=(str(write_records(folder / "records.json", records)),),
        images=str(folder / "images"),
        tokenizer=str(write_tokenizer(folder / "tokenizer.model")),
        store=str(folder / "store.zarr"),
    )
    language = LanguageConfig(vocab_size=512, hidden_size=32, ffn_hidden_size=48, num_layers=8, num_heads=4)
    run = tiny_recipe(tiny_model(language=language), ParallelConfig(pipeline=2))
    run = replace(run, data=data, train=replace(run.train, steps=2), run_dir=str(folder / "run"))
    preprocess(run, str(data.store), workers=0)
    return run


def test_every_layout_gives_the_same_text(ranks: Pools, recipe: Recipe) -> None:
    """Two stages, one rank, tensor and context parallel: token by token the same answers."""
    expected = ranks(2).run(train_and_answer, recipe, ParallelConfig(pipeline=2))[0]
    assert [answer.expected for answer in expected] == list(ANSWERS)
    for num_ranks, parallel in (
        (1, ParallelConfig()),
        (2, ParallelConfig(tensor=2, sequence_parallel=True)),
        (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
        (2, ParallelConfig(context=2)),
    ):
        assert ranks(num_ranks).run(train_and_answer, recipe, parallel)[0] == expected


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
    assert set(document) == {"run", "store", "answers_file", "score", "answers"}
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
