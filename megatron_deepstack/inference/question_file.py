"""Files of questions: JSON lines or a JSON list, as LLaVA's evaluation scripts and benchmarks write them.

    {"question_id": 7, "image": "a.jpg", "text": "What is it?", "answers": ["a dog", "dog"], "category": "animals"}

The question is under `text` or `question`, or it is the first human turn of `conversations`, and the answer then the
turn after it. Pictures are under `image`, `images`, `picture` or `pictures`, answers under `answer` or `answers` (one
text or several). Other keys say nothing about the question and are passed over, unless a question without a picture
has what looks like the name of one under them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.records.turns import is_whole_text
from megatron_deepstack.errors import DataError

_FORM = 'a line such as {"question_id": 7, "image": "a.jpg", "text": "What is it?", "answers": ["a dog"]}'
_TEXT: Final = ("text", "question")
_PICTURES: Final = ("image", "images", "picture", "pictures")
_ANSWERS: Final = ("answers", "answer")
_ID: Final = ("question_id", "id")
_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
"""Endings of names that are pictures in all likelihood."""


@dataclass(frozen=True, slots=True)
class AskedQuestion:
    """One question of a file."""

    id: str
    text: str
    """May hold `<image>` where its pictures belong; otherwise they come first."""
    pictures: tuple[str, ...]
    """Paths or URLs; relative ones have been joined with the folder of pictures."""
    answers: tuple[str, ...]
    """What people answered; empty if the file says nothing."""
    category: str = ""


def read_questions(file: Path, images: str | None = None) -> list[AskedQuestion]:
    """Read a file of questions.

    Args:
        file: The file.
        images: Folder or URL to which its pictures are relative; the file's own folder if None.

    Returns:
        Its questions, in order; at least one, and each with an id of its own.

    Raises:
        DataError: The file is not there or is no file of questions; the message names line and key.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"{file}: cannot be read: {what}; expected a file of questions, {_FORM}") from error
    base = Location.parse(images) if images is not None else Location.parse(str(file.parent))
    found = [_question(record, f"{file}, {where}", base) for where, record in _records(text, file)]
    if not found:
        raise DataError(f"{file}: holds no question; expected {_FORM}")
    first: dict[str, int] = {}
    for number, question in enumerate(found):
        if question.id in first:
            raise DataError(
                f"{file}: questions {first[question.id] + 1} and {number + 1} have the same id {question.id!r}; give "
                "each its own, since answers are compared by it"
            )
        first[question.id] = number
    return found


def _records(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        try:
            yield from ((f"record {number}", record) for number, record in enumerate(json.loads(text), start=1))
        except ValueError as error:
            raise DataError(f"{file}: is not a JSON list: {error}; expected a list, or {_FORM}") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):  # `splitlines` would divide texts at U+2028 and others
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: is not JSON: {error}; expected {_FORM}") from error


def _question(record: Any, where: str, base: Location) -> AskedQuestion:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: found {type(record).__name__}, expected {_FORM}")
    if not is_whole_text(json.dumps(record, ensure_ascii=False)):
        raise DataError(f"{where}: holds half of a surrogate pair, which is no character; correct the text")
    said, answered = _talk(record, where)
    pictures = _texts(record, _PICTURES, where)
    if not pictures:
        _require_no_picture(record, where)
    identifier = next((record[key] for key in _ID if record.get(key) is not None), where)
    return AskedQuestion(
        id=str(identifier),
        text=_asked(record, said, where, alone=not pictures),
        pictures=tuple(_placed(picture, base) for picture in pictures),
        answers=tuple(_texts(record, _ANSWERS, where)) or answered,
        category=str(record.get("category") or ""),
    )


def _asked(record: Mapping[str, Any], said: str | None, where: str, *, alone: bool) -> str:
    """The question. It may be empty beside a picture, and not alone."""
    for key in _TEXT:
        value = record.get(key)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: `{key}` holds {json.dumps(value)[:60]}, expected a text")
    text = next((record[key] for key in _TEXT if record.get(key) is not None), said)
    if text is None:
        raise DataError(f"{where}: has no `text`, `question` or `conversations`; its keys are {', '.join(record)}")
    if alone and not text.strip():
        raise DataError(f"{where}: the question is empty, and has no picture; write it under `text`")
    return str(text)


def _require_no_picture(record: Mapping[str, Any], where: str) -> None:
    """Refuse a question whose picture is under a key that is not read: it would be answered without the picture."""
    known = {*_TEXT, *_PICTURES, *_ANSWERS, *_ID, "category", "conversations"}
    for key, value in record.items():
        names = value if isinstance(value, list) else [value]
        seen = [name for name in names if isinstance(name, str) and PurePosixPath(name).suffix.lower() in _SUFFIXES]
        if key not in known and seen:
            raise DataError(
                f"{where}: `{key}` holds {seen[0][:60]!r}, which looks like a picture, and pictures are read from "
                f"{', '.join(f'`{name}`' for name in _PICTURES)} only; give the key one of these names"
            )


def _talk(record: Mapping[str, Any], where: str) -> tuple[str | None, tuple[str, ...]]:
    """The first question and the answer to it, of a record in LLaVA's training form."""
    turns = record.get("conversations")
    if turns is None:
        return None, ()
    try:
        first, *rest = [(str(turn["from"]), str(turn["value"])) for turn in turns]
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{where}: `conversations` holds no turns with `from` and `value`") from error
    return first[1], (rest[0][1],) if rest and rest[0][0] == "gpt" else ()


def _texts(record: Mapping[str, Any], keys: Sequence[str], where: str) -> list[str]:
    """The texts under the first of `keys` that is there: one, or several in a list; numbers count as texts."""
    for key in keys:
        value = record.get(key)
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, (str, int, float)) for item in values):
            raise DataError(f"{where}: `{key}` holds {json.dumps(value)[:60]}, expected one text or a list of texts")
        return [str(item) for item in values]
    return []


def _placed(picture: str, base: Location) -> str:
    if "://" in picture or Path(picture).is_absolute():
        return picture
    return str(base.child(picture))
