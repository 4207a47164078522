"""Asking a run: the store's pixels and prompts, words and files understood, text as it comes, and a chat's memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import train_two_steps
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.choices import ImageResize, Template
from megatron_deepstack.config.schema import DataConfig, ParallelConfig, Recipe
from megatron_deepstack.data.records.turns import Role, Turn
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.text.conversation import encode_conversation, encode_prompt
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import ConfigError, DataError
from megatron_deepstack.inference.answerer import RunAnswerer
from megatron_deepstack.inference.ask.chat import chat
from megatron_deepstack.inference.ask.launch import Manner, Reply
from megatron_deepstack.inference.ask.preparation import Asked, Preparation, Prepared
from megatron_deepstack.inference.ask.session import Session
from megatron_deepstack.inference.ask.text import StopWords, TextStream
from megatron_deepstack.inference.ask.words import Words, understand
from megatron_deepstack.inference.main import open_questions
from megatron_deepstack.inference.questions import read_question
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_qwen3_vl
from megatron_deepstack.testing.tiny_chat import (
    LLAMA_3_CONFIG,
    LLAMA_3_TOKENS,
    QWEN3_VL_TOKENS,
    QWEN3_VL_WORDS,
    QWEN_CONFIG,
    QWEN_TOKENS,
    write_chat_tokenizer,
)
from megatron_deepstack.testing.tiny_data import record, write_photos, write_records
from orchestration.preprocess.driver.run import preprocess

Pools = Callable[[int], RankPool]


@pytest.fixture(scope="module")
def tokenizer(recipe: Recipe) -> Tokenizer:
    return load_tokenizer(str(recipe.data.tokenizer))


@pytest.fixture(scope="module")
def preparation(recipe: Recipe, tokenizer: Tokenizer) -> Preparation:
    return Preparation.of_run(recipe, tokenizer, pytest.fail)


def photo(recipe: Recipe, number: int) -> str:
    return str(sorted(Path(str(recipe.data.images)).iterdir())[number])


@pytest.mark.parametrize("resize", ImageResize)
def test_a_picture_has_the_pixels_of_the_store(
    recipe: Recipe, tokenizer: Tokenizer, tmp_path: Path, resize: ImageResize
) -> None:
    """Also where the store was made otherwise than the run's recipe says."""
    data = replace(recipe.data, store=str(tmp_path / "store.zarr"), resize=resize)
    preprocess(replace(recipe, data=data), str(data.store), workers=0)
    asked = replace(recipe, data=replace(data, resize=ImageResize.PILLOW))
    preparation, store = Preparation.of_run(asked, tokenizer, pytest.fail), Store.open(str(data.store))
    assert preparation.processor.describe() == store.attributes.processor
    for number in range(store.num_images):
        stored = store.image(number)
        picture = preparation.read(str(Path(str(data.images)) / stored.path))
        assert picture.grid == stored.grid
        np.testing.assert_array_equal(picture.slots, store.read_views(number, range(stored.count)))


def test_views_of_any_size_have_the_pixels_of_the_store(tmp_path: Path) -> None:
    """Several pictures of a batch, as the ranks read them: one after another, in the order of the plan."""
    names = write_photos(tmp_path / "photos", 4)
    write_records(tmp_path / "records.json", [record(name, [name]) for name in names])
    words = write_chat_tokenizer(tmp_path / "tokenizer", QWEN3_VL_TOKENS, QWEN_CONFIG, QWEN3_VL_WORDS)
    model = tiny_qwen3_vl()
    recipe = Recipe(
        model=replace(model, language=replace(model.language, vocab_size=512)),
        data=DataConfig(
            records=(str(tmp_path / "records.json"),),
            images=str(tmp_path / "photos"),
            tokenizer=str(words),
            template=Template.QWEN3_VL,
            store=str(tmp_path / "store.zarr"),
            min_pixels=40 * 40,
            max_pixels=120 * 90,
        ),
    )
    preprocess(recipe, str(recipe.data.store), workers=0)
    tokenizer, store = load_tokenizer(str(words)), Store.open(str(recipe.data.store))
    preparation = Preparation.of_run(recipe, tokenizer, pytest.fail)
    assert preparation.processor.describe() == store.attributes.processor
    asked = [Asked("What is it?", (str(tmp_path / "photos" / name),)) for name in names]
    views = preparation.views([preparation.prepare(one) for one in asked])
    order = [2, 0, 3, 1]
    np.testing.assert_array_equal(views.read_flat(order), store.read_flat(order))
    assert [views.image(number).grid for number in order] == [store.grid(number) for number in order]
    assert views.read_flat([]).shape == (0,)


def test_without_a_store_the_recipe_says_how(recipe: Recipe, tokenizer: Tokenizer, preparation: Preparation) -> None:
    said: list[str] = []
    gone = replace(recipe, data=replace(recipe.data, store="/nowhere/train.zarr"))
    assert Preparation.of_run(gone, tokenizer, said.append) == preparation
    assert said == ["ask: no store of the run is there (/nowhere/train.zarr); pictures are prepared as its recipe says"]


def test_a_prompt_is_that_of_the_stored_sample(recipe: Recipe, preparation: Preparation, tokenizer: Tokenizer) -> None:
    store, _ = open_questions(recipe, str(recipe.data.store))
    for number, pictures in enumerate(((0,), (1, 2), (3,), (), ())):
        prepared = preparation.prepare(Asked("What is it?", tuple(photo(recipe, n) for n in pictures)))
        np.testing.assert_array_equal(prepared.prompt, read_question(store, number, tokenizer).prompt)


@pytest.mark.parametrize("template", ["v1", "llama_3", "qwen"])
def test_a_question_after_others_is_encoded_as_in_training(template: str, recipe: Recipe, tmp_path: Path) -> None:
    """The tokens before the last answer of a whole conversation."""
    control = {
        "llama_3": (LLAMA_3_TOKENS, LLAMA_3_CONFIG),
        "qwen": (QWEN_TOKENS, QWEN_CONFIG),
    }
    path = str(recipe.data.tokenizer) if template == "v1" else write_chat_tokenizer(tmp_path, *control[template])
    tokenizer = load_tokenizer(path)
    turns = [Turn(Role.HUMAN, "<image>\nWhat is it?"), Turn(Role.GPT, "A photo."), Turn(Role.HUMAN, "Of what?")]
    prompt = encode_prompt("Of what?", template, tokenizer, history=turns[:2])
    whole, learned = encode_conversation([*turns, Turn(Role.GPT, "Two.")], template, tokenizer)
    end = int(np.flatnonzero(np.diff(learned.astype(np.int8)) == 1)[-1]) + 1
    np.testing.assert_array_equal(prompt, whole[:end])


def test_captions_have_no_second_question(tokenizer: Tokenizer) -> None:
    before = [Turn(Role.HUMAN, "<image>"), Turn(Role.GPT, "A photo.")]
    with pytest.raises(DataError, match="template plain writes captions only"):
        encode_prompt("And?", "plain", tokenizer, history=before)


@pytest.mark.parametrize(
    ("pictures", "question", "message"),
    [
        (("broken.jpg",), "What is it?", "broken.jpg: .*give another picture"),
        (("empty.jpg",), "What is it?", "empty.jpg: the file is empty; give another picture"),
        (("missing.jpg",), "What is it?", "missing.jpg: no such file; give another picture"),
        ((), "What is <image>?", "holds 1 <image>, but there are 0 images"),
        ((), "word " * 3000, r"takes \d+ positions, 0 of them for 0 pictures, and the model's context has 64 \(train"),
        (("0",) * 9, "What?", r"for 9 pictures, and the model's context has 64 \(train.seq_length\)"),
    ],
    ids=["broken", "empty", "missing", "placeholder without picture", "too long", "too many pictures"],
)
def test_what_cannot_be_asked_is_said(
    recipe: Recipe,
    preparation: Preparation,
    tmp_path: Path,
    pictures: tuple[str, ...],
    question: str,
    message: str,
) -> None:
    (tmp_path / "broken.jpg").write_bytes(Path(photo(recipe, 0)).read_bytes()[:200])
    (tmp_path / "empty.jpg").write_bytes(b"")
    paths = tuple(photo(recipe, 0) if name == "0" else str(tmp_path / name) for name in pictures)
    with pytest.raises(DataError, match=message):
        replace(preparation, context=64).prepare(Asked(question, paths))


def test_an_empty_question_is_refused_before_ranks_start(recipe: Recipe, preparation: Preparation) -> None:
    session = Session(RunAnswerer(recipe), preparation, Manner())
    with pytest.raises(DataError, match="the question is empty; write it in quotes after the run and the pictures"):
        session.ask_one(" ", (photo(recipe, 0),), None)


def test_a_huge_picture_is_not_decoded(recipe: Recipe, preparation: Preparation) -> None:
    small = replace(preparation, processor=replace(preparation.processor, max_image_pixels=100))
    with pytest.raises(DataError, match=r"more than data\.max_image_pixels allows"):
        small.prepare(Asked("What is it?", (photo(recipe, 0),)))


@pytest.mark.parametrize(
    ("words", "option", "expected"),
    [
        (["a.png", "What is it?"], None, Words((), ("a.png",), "What is it?")),
        (["What is it?"], None, Words((), (), "What is it?")),
        (["a.png", "b", "Same?"], None, Words((), ("a.png", "b"), "Same?")),
        (["a.png"], None, Words((), ("a.png",), None)),
        (["b"], None, Words((), ("b",), None)),
        ([], None, Words((), (), None)),
        (["a.png", ""], None, Words((), ("a.png",), "")),
        (["a.png", "b"], "b", Words((), ("a.png", "b"), "b")),
        (
            ["data.tokenizer=t", "a.png", "Why?", "model.layers=local"],
            None,
            Words(("data.tokenizer=t", "model.layers=local"), ("a.png",), "Why?"),
        ),
        (["Is model.x=3 right?"], None, Words((), (), "Is model.x=3 right?")),
    ],
)
def test_words_are_told_apart(words: list[str], option: str | None, expected: Words) -> None:
    assert understand(words, option, lambda path: path in ("a.png", "b")) == expected


def test_home_is_expanded_in_pictures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    understood = understand(["~/a.png", "~ or $5, which?"], None, lambda path: path == "/home/me/a.png")
    assert understood == Words((), ("/home/me/a.png",), "~ or $5, which?")
    assert understand(["$5?"], None, lambda path: False).question == "$5?"
    with pytest.raises(ConfigError, match="no home folder is known of the user"):
        understand(["~nobody-has-this-name/a.png"], None, lambda path: False)


@pytest.mark.parametrize("words", [["c.png", "What?"], ["c.jpeg"], ["s3://bucket/c"], ["dog", "What?"]])
def test_a_picture_that_is_not_there_is_named(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"{words[0]}: no such picture; the words after the run are pictures"):
        understand(words, None, lambda path: False)


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("A photo of three dogs.", (), "A photo of three dogs."),
        ("A photo. USER: more", ("USER:",), "A photo."),
        ("A photo. US", ("USER:",), "A photo. US"),
        ("早上好 dog", (), "早上好 dog"),
        ("one\n\ntwo", ("\n\n",), "one"),
    ],
)
def test_text_is_shown_as_it_comes_and_never_taken_back(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...], shown: str
) -> None:
    words = StopWords(stop, tokenizer)
    stream, pieces, ids = TextStream(words), [], []
    for token in tokenizer.encode(text):
        ids.append(token)
        pieces.append(stream.add(token))
        assert "\ufffd" not in pieces[-1]
        if words(ids):
            break
    pieces.append(stream.rest())
    assert "".join(pieces) == shown
    assert words(ids) is (words.before(text) != text)


class Remembering:
    """Stands for the ranks in a chat."""

    def __init__(self, preparation: Preparation) -> None:
        self.preparation, self.asked = preparation, list[Asked]()

    def ask(self, asked: Asked, shown: Callable[[str], None]) -> Reply:
        self.preparation.prepare(asked)
        self.asked.append(asked)
        shown(f"answer {len(self.asked)}")
        return Reply(asked, f"answer {len(self.asked)}", "stop")


def talk(preparation: Preparation, lines: Sequence[str], pictures: Sequence[str] = ()) -> tuple[list[Asked], list[str]]:
    """What was asked, and what the chat said about itself."""
    ranks: Any = Remembering(preparation)
    said: list[str] = []
    chat(ranks, lines, pictures, lambda text: None, said.append)
    return ranks.asked, said


def test_a_chat_remembers_turns_and_pictures(recipe: Recipe, preparation: Preparation) -> None:
    first, second = photo(recipe, 0), photo(recipe, 1)
    lines = ["What?", "", "/picture", f"/picture {second}", "And this?", "/new", "Hello?", "/quit", "Never?"]
    asked, said = talk(replace(preparation, context=4096), lines, [first])
    assert [one.text for one in asked] == ["<image>\nWhat?", "<image>\nAnd this?", "Hello?"]
    assert [one.pictures for one in asked] == [(first,), (first, second), ()]
    assert asked[1].history == (Turn(Role.HUMAN, "<image>\nWhat?"), Turn(Role.GPT, "answer 1"))
    assert asked[2].history == ()
    assert said[0].startswith("A line is a question.")
    assert said[1:] == [f"{second} belongs to the next question", "a new conversation"]


def test_a_chat_goes_on_after_a_question_that_cannot_be_asked(preparation: Preparation) -> None:
    asked, said = talk(replace(preparation, context=200), ["/picture gone.png", "word " * 200, "Hello?"])
    assert [one.text for one in asked] == ["Hello?"]
    assert "gone.png: no such file" in said[0]
    assert "the model's context has 200" in said[1]


def answer_prepared(rank: int, recipe: Recipe, preparation: Preparation, prepared: list[Prepared]) -> list[list[int]]:
    from megatron_deepstack.inference.ask.rank import Batch, answer_batch
    from megatron_deepstack.inference.loading import load_engine

    train_two_steps(rank, recipe)
    engine = load_engine(recipe, groups_for(recipe.parallel))
    batch = Batch(
        questions=tuple(prepared),
        first_number=0,
        max_new_tokens=6,
        stop_ids=(510,),
        stop_words=StopWords((), preparation.tokenizer),
        sampling=Manner().sampling,
    )
    return answer_batch(engine, preparation, batch)


def test_questions_of_all_kinds_are_answered_together_as_alone(
    ranks: Pools, recipe: Recipe, preparation: Preparation
) -> None:
    """With one picture, two, and none; the last has room for two tokens only."""
    pictures: list[tuple[int, ...]] = [(0,), (1, 2), ()]
    prepared = [
        preparation.prepare(Asked("What is it?", tuple(photo(recipe, n) for n in numbers))) for numbers in pictures
    ]
    prepared.append(replace(prepared[0], room=2))
    together = ranks(2).run(answer_prepared, recipe, preparation, prepared)[0]
    one_rank = replace(recipe, parallel=ParallelConfig())
    alone = [ranks(1).run(answer_prepared, one_rank, preparation, [one])[0][0] for one in prepared]
    assert together == alone
    assert [len(ids) for ids in together] == [6, 6, 6, 2]


def test_a_run_is_looked_at_before_ranks_start(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    there = replace(recipe, run_dir=str(tmp_path), data=DataConfig())
    with pytest.raises(ConfigError, match=r"data\.tokenizer: not set; `ask` needs it"):
        Session.of(RunAnswerer(there), Manner(), pytest.fail)


@pytest.mark.slow
def test_a_file_of_questions_is_answered_by_the_command_line(ranks: Pools, recipe: Recipe, tmp_path: Path) -> None:
    """One question of three has a broken picture: the others are answered, and the exit code says it."""
    ranks(2).run(train_two_steps, recipe)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    questions: list[dict[str, Any]] = [
        {"question_id": 1, "image": photo(recipe, 0), "text": "What is it?"},
        {"question_id": 2, "image": "broken.png", "text": "What is it?"},
        {"question_id": 3, "text": "Hello?"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, questions)))
    arguments = ["ask", recipe.run_dir, "--file", str(file), "--json", "--max-new-tokens", "4", "parallel.pipeline=1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == DataError.exit_code, result.output
    assert "1 of 3 questions could not be asked" in result.stderr
    answers = json.loads(result.stdout)["answers"]
    assert [(one["id"], one["ended"], one["error"] is None) for one in answers] == [
        ("1", answers[0]["ended"], True),
        ("2", "error", False),
        ("3", answers[2]["ended"], True),
    ]
    assert "broken.png" in answers[1]["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json"], "--json: a chat has no document; give a question or --file"),
        (["--file", "q.jsonl", "Why?"], "--file q.jsonl: found a question or pictures beside it"),
    ],
)
def test_options_that_do_not_go_together(recipe: Recipe, arguments: list[str], message: str) -> None:
    Path(recipe.run_dir).mkdir(exist_ok=True)
    result = CliRunner().invoke(app, ["ask", recipe.run_dir, *arguments])
    assert (result.exit_code, message in result.stderr) == (2, True), result.output
