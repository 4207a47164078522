"""Reading LLaVA-style records: a JSON list, or JSON lines, of conversations about images.

Every record is checked before any work starts: a record is either usable as a whole or named in the error, the first
ten with file, number and what is wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.data.conversation import Role, Template, Turn, check_turns
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.tokens import IMAGE_TOKEN

_SHOWN: Final = 10
"""Faulty records listed in an error."""


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation."""

    id: str
    images: tuple[str, ...]
    """Paths relative to the image folder, in the order of their placeholders; empty for text only."""
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class RecordFile:
    """The records of a file."""

    path: str
    sha256: str
    """Of the file's bytes."""
    records: tuple[Record, ...]


def read_records(path: str | Path, template: Template) -> RecordFile:
    """Read and check all records of a JSON or JSON-lines file.

    Raises DataError when the file is missing, is not JSON, holds no records, or holds faulty ones (the first ten are
    listed): no id, no conversations, an unknown role, turns the template cannot write, or a number of `<image>` other
    than that of its images.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: the records cannot be read: {error.strerror or error}. Give a LLaVA-style JSON file "
            "(data.records, or --records)."
        ) from error
    raw = _parse(data, str(path))
    if not raw:
        raise DataError(f"{path}: holds no records; at least one is needed")
    records: list[Record] = []
    faults: list[str] = []
    for number, item in enumerate(raw):
        try:
            records.append(parse_record(item, template))
        except _FaultError as fault:
            name = f" (id {item['id']!r})" if isinstance(item, dict) and "id" in item else ""
            faults.append(f"record {number}{name}: {fault}")
    if faults:
        raise DataError(_list_faults(str(path), faults, len(raw)))
    return RecordFile(str(path), hashlib.sha256(data).hexdigest(), tuple(records))


def parse_record(item: Any, template: Template) -> Record:
    """One record from its JSON value; raises an error whose message says what is wrong with it."""
    if not isinstance(item, dict):
        raise _FaultError(f"is {_kind(item)}, an object was expected")
    identifier = item.get("id")
    if isinstance(identifier, bool) or not isinstance(identifier, str | int) or identifier == "":
        raise _FaultError("has no id; give each record a text or a whole number as `id`")
    images = tuple(_parse_images(item.get("image")))
    turns = tuple(_parse_turns(item.get("conversations")))
    record = Record(_text(str(identifier), "its id"), images, turns)
    _check_placeholders(record)
    try:
        check_turns(turns, template)
    except DataError as error:
        raise _FaultError(str(error)) from error
    return record


class _FaultError(Exception):
    """What is wrong with one record."""


def _parse(data: bytes, path: str) -> Sequence[Any]:
    """A JSON list, or one JSON value per line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    try:
        if text.lstrip()[:1] == "[":
            document: list[Any] = json.loads(text)
            return document
        return list(_parse_lines(text, path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    except RecursionError as error:
        raise DataError(f"{path}: not a list of records: it is nested too deeply") from error


def _parse_lines(text: str, path: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not JSON: {error}. A records file is a JSON list, or one object per line."
                ) from error


def _parse_images(value: Any) -> Iterator[str]:
    if value is None:
        return
    for path in value if isinstance(value, list) else [value]:
        if not isinstance(path, str) or not path or "\0" in path:
            raise _FaultError(f"`image` holds {path!r}; a path, or a list of paths, was expected")
        yield _text(path, "`image`")


def _parse_turns(value: Any) -> Iterator[Turn]:
    if not isinstance(value, list) or not value:
        raise _FaultError(f"has no conversations: found {_kind(value)}, a list of turns was expected")
    for number, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise _FaultError(f"turn {number} is not an object with a text as `value`")
        role = turn.get("from")
        if not isinstance(role, str) or role not in set(Role):
            raise _FaultError(f"turn {number} has the unknown role {role!r}; known: {', '.join(Role)}")
        yield Turn(Role(role), _text(turn["value"], f"turn {number}"))


def _check_placeholders(record: Record) -> None:
    found = sum(turn.text.count(IMAGE_TOKEN) for turn in record.turns)
    if found != len(record.images):
        raise _FaultError(f"has {len(record.images)} images, but {found} {IMAGE_TOKEN} in its conversations")


def _text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _FaultError(f"{where} holds half of a surrogate pair, which is no character") from error
    return text


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "nothing"}
    return "an empty list" if value == [] else kinds.get(type(value), repr(value))


def _list_faults(path: str, faults: Sequence[str], total: int) -> str:
    more = [f"... and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    head = f"{path}: {len(faults)} of {total} records cannot be used; mend or remove them:"
    return "\n  ".join([head, *faults[:_SHOWN], *more])
