"""LLaVA-style records: conversations about images, from their JSON values.

Every record is checked before any work starts: a record is either usable as a whole or named in the error, the first
ten with file, number and what is wrong. Ids may repeat, as they do in the published data.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from megatron_deepstack.data.records.turns import Role, Turn
from megatron_deepstack.data.text.conversation import Template, check_turns
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.tokens import IMAGE_TOKEN

_SHOWN: Final = 10
"""Faulty records listed in an error."""


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation."""

    id: str
    images: tuple[str, ...]
    """Paths below the image folder, or `SHARD/MEMBER` in a tar shard, by their placeholders; empty for text only."""
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class RecordRules:
    """What a record is checked against."""

    template: Template
    image_folder: str = ""
    """Absolute path of the local image folder, below which absolute image paths are taken; empty for none."""


class Faults:
    """Faulty records of a job: all are counted, the first ten kept."""

    def __init__(self) -> None:
        self.total = 0
        self.records = 0
        """Records seen, faulty or not."""
        self._listed: list[str] = []

    def add(self, where: str, fault: str) -> None:
        """Count a faulty record."""
        self.total += 1
        if self.total <= _SHOWN:
            self._listed.append(f"{where}: {fault}")

    def raise_if_any(self) -> None:
        """Raise DataError, with the first ten, if there is any."""
        if self.total:
            more = [f"... and {self.total - _SHOWN} more"] if self.total > _SHOWN else []
            head = f"{self.total} of {self.records} records cannot be used; mend or remove them:"
            raise DataError("\n  ".join([head, *self._listed, *more]))


def parse_record(item: Any, rules: RecordRules, faults: Faults, where: str) -> Record | None:
    """One record from its JSON value; None, with what is wrong in `faults`, if it cannot be used.

    Faults are: no id, no conversations, an unknown role, turns that the template cannot write, a number of `<image>`
    other than that of the images, and an image path that leaves the image folder.
    """
    faults.records += 1
    try:
        return _parse(item, rules)
    except _FaultError as fault:
        name = f" (id {item['id']!r})" if isinstance(item, dict) and "id" in item else ""
        faults.add(f"{where}{name}", str(fault))
        return None


def _parse(item: Any, rules: RecordRules) -> Record:
    if not isinstance(item, dict):
        raise _FaultError(f"is {_kind(item)}, an object was expected")
    identifier = item.get("id")
    if isinstance(identifier, bool) or not isinstance(identifier, str | int) or identifier == "":
        raise _FaultError("has no id; give each record a text or a whole number as `id`")
    images = tuple(_place(path, rules.image_folder) for path in _parse_images(item.get("image")))
    turns = tuple(_parse_turns(item.get("conversations")))
    record = Record(_text(str(identifier), "its id"), images, turns)
    _check_placeholders(record)
    try:
        check_turns(turns, rules.template)
    except DataError as error:
        raise _FaultError(str(error)) from error
    return record


def _place(path: str, folder: str) -> str:
    """The path below the image folder, in its one spelling. Records are data from elsewhere: they choose among the
    images they are given, and no other file of the machine."""
    normal = posixpath.normpath(path)
    if "://" in path:
        raise _FaultError(f"`image` is the URL {path!r}; give its folder as data.images, and the path below it here")
    if normal.startswith("/"):
        if not folder or not f"{normal}/".startswith(f"{folder.rstrip('/')}/"):
            raise _FaultError(
                f"`image` is {path!r}, outside the image folder {folder or '(none)'}; make it relative to the folder, "
                "or give a folder that holds all images (data.images, or --images)"
            )
        return posixpath.relpath(normal, folder)
    if normal.split("/")[0] == "..":
        raise _FaultError(f"`image` is {path!r}, which leaves the image folder")
    return normal


class _FaultError(Exception):
    """What is wrong with one record."""


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
