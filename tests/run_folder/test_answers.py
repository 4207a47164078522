"""Answers are kept by store: a look at other questions does not cost a run its held-out score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_deepstack.errors import DataError
from megatron_deepstack.run_folder.answers import (
    Answer,
    Score,
    answers_file,
    read_answer_sets,
    read_answers,
    require_writable_answers,
    write_answers,
)


def answers(store: str, *texts: str) -> list[Answer]:
    return [Answer(str(n), "q", text, "yes", text == "yes", store, None) for n, text in enumerate(texts)]


def test_another_store_leaves_the_held_out_answers_alone(tmp_path: Path) -> None:
    stores = {
        "held": str(tmp_path / "held.zarr"),
        "other": str(tmp_path / "b" / "other.zarr"),
        "url": "s3://b/held.zarr",
    }
    files = {name: answers_file(tmp_path, store, held_out=stores["held"], first=None) for name, store in stores.items()}
    assert files["held"] == tmp_path / "answers.jsonl"
    assert len(set(files.values())) == 3
    for name, file in files.items():
        write_answers(file, answers(stores[name], "yes", "no"))
    assert next(one.title for one in read_answer_sets(tmp_path)) == "Held-out questions"
    assert sorted(one.title for one in read_answer_sets(tmp_path))[1:] == [
        "Questions of held.zarr",
        "Questions of other.zarr",
    ]
    assert {answer.store for answer in read_answers(tmp_path)} == {stores["held"]}


def test_a_file_says_who_was_asked_what(tmp_path: Path) -> None:
    file = answers_file(tmp_path, "held.zarr", held_out="held.zarr", first=None)
    written = [replace(one, step=40, fingerprint="0123456789abcdef") for one in answers("held.zarr", "yes")]
    write_answers(file, written)
    (one,) = read_answer_sets(tmp_path)
    assert one.answers == tuple(written)
    assert one.origin == "checkpoint after step 40, questions of fingerprint 0123456789ab"
    write_answers(file, answers("held.zarr", "yes"))
    assert [one.origin for one in read_answer_sets(tmp_path)] == [""]


def test_the_first_questions_alone_do_not_replace_all(tmp_path: Path) -> None:
    file = answers_file(tmp_path, "held.zarr", held_out="held.zarr", first=3)
    assert file.parent == tmp_path / "answers"
    write_answers(file, answers("held.zarr", "yes"))
    (one,) = read_answer_sets(tmp_path)
    assert (one.held_out, one.title) == (False, "First 3 questions of held.zarr")
    assert read_answers(tmp_path) == ()


@pytest.mark.parametrize("written", ["held.zarr", "./held.zarr/", "x/../held.zarr", "link.zarr"])
def test_one_store_has_one_file_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held.zarr").mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "link.zarr").symlink_to("held.zarr")
    assert answers_file("run", written, held_out=str(tmp_path / "held.zarr"), first=None) == Path("run/answers.jsonl")
    assert answers_file("run", written, held_out=None, first=None).parent == Path("run/answers")


def test_stores_of_one_name_are_kept_apart() -> None:
    assert answers_file("r", "/a/x.zarr", held_out=None, first=None) != answers_file(
        "r", "/b/x.zarr", held_out=None, first=None
    )


WORDS = {
    "one question": (["yes"], "exact match 1 of 1"),
    "two": (["yes", "no"], "exact match 1 of 2 = 50.0%; chance (the commonest answer every time) 100.0%"),
}


@pytest.mark.parametrize(("texts", "words"), WORDS.values(), ids=WORDS)
def test_chance_is_said_only_beside_several_questions(texts: list[str], words: str) -> None:
    assert Score.of(answers("s", *texts)).words == words


def test_without_expected_answers_there_is_no_score() -> None:
    asked = [Answer("0", "What is it?", "A cat.", "", False, "s", None)]
    assert Score.of(asked).total == 0
    assert Score.of(asked).words.startswith("no score")


def test_a_folder_that_cannot_be_written_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "answers").write_text("a file in the way")
    for attempt in (require_writable_answers, lambda file: write_answers(file, [])):
        with pytest.raises(DataError, match=r"the answers cannot be written.*or copy the run elsewhere"):
            attempt(tmp_path / "answers" / "x.jsonl")


def test_looking_whether_answers_can_be_written_leaves_the_old_ones(tmp_path: Path) -> None:
    write_answers(tmp_path / "answers.jsonl", answers("s", "yes"))
    require_writable_answers(tmp_path / "answers.jsonl")
    assert [answer.answer for answer in read_answers(tmp_path)] == ["yes"]
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"]
