"""Files of questions in the forms in which benchmarks write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_deepstack.errors import DataError
from megatron_deepstack.inference.question_file import AskedQuestion, read_questions


def write(folder: Path, *records: Any, as_list: bool = False) -> Path:
    file = folder / "questions.jsonl"
    file.write_text(json.dumps(records) if as_list else "\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"question_id": 7, "image": "a.jpg", "text": "What?", "category": "conv"},
            AskedQuestion("7", "What?", ("/pictures/a.jpg",), (), "conv"),
        ),
        (
            {"id": "x", "question": "Both?", "images": ["a.jpg", "/b.jpg"], "answers": ["yes", "no", 3]},
            AskedQuestion("x", "Both?", ("/pictures/a.jpg", "/b.jpg"), ("yes", "no", "3")),
        ),
        (
            {
                "id": "c",
                "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}],
                "image": "s3://bucket/a.jpg",
            },
            AskedQuestion("c", "<image>\nWhat?", ("s3://bucket/a.jpg",), ("A dog.",)),
        ),
        (
            {"id": "p", "text": "", "pictures": ["a.jpg"], "source": "b.jpg"},
            AskedQuestion("p", "", ("/pictures/a.jpg",), ()),
        ),
        ({"text": "Hello?", "answer": "hi", "image": None}, AskedQuestion("FILE, line 1", "Hello?", (), ("hi",))),
    ],
    ids=["LLaVA", "several pictures and answers", "training form", "picture alone", "without id"],
)
def test_forms(tmp_path: Path, record: dict[str, Any], expected: AskedQuestion) -> None:
    file = write(tmp_path, record)
    (found,) = read_questions(file, "/pictures")
    assert repr(found) == repr(expected).replace("FILE", str(file))


def test_a_list_and_the_files_own_folder(tmp_path: Path) -> None:
    records = [{"id": n, "text": "What?", "image": "a.jpg"} for n in range(2)]
    found = read_questions(write(tmp_path, *records, as_list=True))
    assert [(one.id, one.pictures) for one in found] == [("0", (f"{tmp_path}/a.jpg",)), ("1", (f"{tmp_path}/a.jpg",))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no question; expected a line such as"),
        ('{"text": "a"}\nnonsense', "line 2: is not JSON"),
        ("[1, 2", "is not a JSON list"),
        ('{"text": "a"}\n{"text": "\\ud800"}', "line 2: holds half of a surrogate pair"),
        ('{"text": "a", "answers": ["\\udc00"]}', "line 1: holds half of a surrogate pair"),
        ('["a"]', "record 1: found str, expected a line such as"),
        ('{"query": "a"}', "line 1: has no `text`, `question` or `conversations`; its keys are query"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}', "questions 1 and 2 have the same id '1'"),
        ('{"text": "a", "image": {"path": "x"}}', "line 1: `image` holds .*expected one text or a list"),
        ('{"conversations": [1]}', "line 1: `conversations` holds no turns"),
        ('{"text": 5}', "line 1: `text` holds 5, expected a text"),
        ('{"text": " "}', "line 1: the question is empty, and has no picture"),
        ('{"text": "a", "img_path": "x/a.JPG"}', "line 1: `img_path` holds 'x/a.JPG', which looks like a picture"),
        ('{"text": "a", "photos": ["a.png", "b.png"]}', "line 1: `photos` holds 'a.png', which looks like a picture"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_questions(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file"):
        read_questions(tmp_path / "none.jsonl")


def test_marks_of_byte_order_and_of_lines_within_texts_are_read(tmp_path: Path) -> None:
    """JSON need not escape U+2028 and U+0085, at which `str.splitlines` divides."""
    file = tmp_path / "questions.jsonl"
    texts = ["two\u2028lines", "two\x85lines"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    assert [one.text for one in read_questions(file)] == texts
