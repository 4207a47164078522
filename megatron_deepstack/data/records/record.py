"""Records: conversations about images, from JSON values in any of the dialects that `dialects` reads.

Every record is checked before any work starts. A record can be used as a whole, or it is an error; the first ten errors
are listed with file, number and what is wrong. Nothing that a record holds is dropped silently. Ids may repeat, as they
do in the published data; a record without an id gets its file and number as id.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from megatron_deepstack.data.records.dialects import kind_of, read_conversation
from megatron_deepstack.data.records.keys import FaultError, how_to_ignore
from megatron_deepstack.data.records.turns import VIDEO_TOKEN, Turn, Video, is_whole_text
from megatron_deepstack.data.text.conversation import Template, check_turns, writes_tools
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN

_SHOWN: Final = 10
"""Faulty records listed in an error."""


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation."""

    id: str
    images: tuple[str, ...]
    """Paths below the image folder, or `SHARD/MEMBER` in a tar shard, in the order of their placeholders."""
    turns: tuple[Turn, ...]
    videos: tuple[Video, ...] = ()
    """Their paths are as those of images, in the order of their placeholders."""


@dataclass(frozen=True, slots=True)
class RecordRules:
    """What a record is checked against."""

    template: Template
    image_folder: str = ""
    """Absolute path of the local image folder; absolute image paths must lie below it. Empty for none."""
    ignore_keys: frozenset[str] = frozenset()
    """Keys of records, turns and parts of them that are passed over."""
    takes_videos: bool = False
    """Whether the model and the template take videos."""


class Faults:
    """The faulty records of a job: all are counted, and the first ten are kept."""

    def __init__(self) -> None:
        self.total = 0
        self.records = 0
        """Records seen, faulty or not."""
        self._listed: list[str] = []
        self._unread: Counter[str] = Counter()
        """For each key that nothing reads, the number of records that hold it."""

    def add(self, where: str, fault: str, unread: Sequence[str] = ()) -> None:
        """Count a faulty record.

        Args:
            where: Its place, for the message.
            fault: What is wrong with it.
            unread: Keys of it that nothing reads.
        """
        self.total += 1
        self._unread.update(unread)
        if self.total <= _SHOWN:
            self._listed.append(f"{where}: {fault}")

    def raise_if_any(self) -> None:
        """Raise DataError if there was any fault; the message lists the first ten."""
        if self.total:
            more = [f"... and {self.total - _SHOWN} more"] if self.total > _SHOWN else []
            head = f"{self.total} of {self.records} records cannot be used; correct or remove them:"
            raise DataError("\n  ".join([head, *self._listed, *more]) + self._advice())

    def _advice(self) -> str:
        """How keys that nothing reads can be passed over."""
        if not self._unread:
            return ""
        counted = ", ".join(f"`{key}` in {count} records" for key, count in self._unread.most_common(_SHOWN))
        return f"\nNot read: {counted}. If these say nothing that is to be learned: {how_to_ignore(self._unread)}"


def parse_record(
    item: Any, rules: RecordRules, faults: Faults, where: str, number: str, images: Sequence[str] | None = None
) -> Record | None:
    """Make one record from its JSON value.

    Faults are: no conversation, an unknown role, a key or a placeholder that nothing reads, turns that the template
    cannot write, a number of `<image>` that differs from the number of images, and an image path that leaves the image
    folder.

    Args:
        item: The JSON value, in any dialect.
        rules: What it is checked against.
        faults: Receives what is wrong with it.
        where: The record's place, for messages.
        number: The id of a record that has none.
        images: Its images, used instead of those that it names.

    Returns:
        The record; None if it cannot be used.
    """
    faults.records += 1
    try:
        return _parse(item, rules, number, images)
    except FaultError as fault:
        name = f" (id {item['id']!r})" if isinstance(item, dict) and "id" in item else ""
        faults.add(f"{where}{name}", str(fault), fault.keys)
        return None


def _parse(item: Any, rules: RecordRules, number: str, images: Sequence[str] | None) -> Record:
    if not isinstance(item, dict):
        raise FaultError(f"is {kind_of(item)}, an object was expected")
    identifier = _identifier(item.get("id"), number)
    talk = read_conversation(
        item, rules.ignore_keys, writes_tools=writes_tools(rules.template), takes_videos=rules.takes_videos
    )
    places = tuple(_place(path, rules.image_folder) for path in (talk.images if images is None else images))
    videos = tuple(
        replace(video, files=tuple(_place(path, rules.image_folder) for path in video.files)) for video in talk.videos
    )
    record = Record(identifier, places, talk.turns, videos)
    _check_placeholders(record)
    try:
        check_turns(record.turns, rules.template)
    except DataError as error:
        raise FaultError(str(error)) from error
    return record


def _identifier(value: Any, number: str) -> str:
    if value is None:
        return number
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise FaultError(f"has the id {value!r}; a text or a whole number was expected, or no `id` at all")
    if not is_whole_text(str(value)):
        raise FaultError("its id holds half of a surrogate pair, which is no character")
    return str(value)


def _place(path: str, folder: str) -> str:
    """The path below the image folder, in its only accepted spelling.

    Records come from elsewhere: they may choose among the images they are given, but must reach no other file of the
    machine.
    """
    normal = posixpath.normpath(path)
    if "://" in path:
        raise FaultError(f"`image` is the URL {path!r}; give its folder as data.images, and the path below it here")
    if normal.startswith("/"):
        if not folder or not f"{normal}/".startswith(f"{folder.rstrip('/')}/"):
            raise FaultError(
                f"`image` is {path!r}, outside the image folder {folder or '(none)'}; make it relative to the folder, "
                "or give a folder that holds all images (data.images=...)"
            )
        return posixpath.relpath(normal, folder)
    if normal.split("/")[0] == "..":
        raise FaultError(f"`image` is {path!r}, which leaves the image folder")
    return normal


def _check_placeholders(record: Record) -> None:
    found = sum(turn.text.count(IMAGE_TOKEN) for turn in record.turns)
    if found != len(record.images):
        raise FaultError(
            f"has {len(record.images)} images, but {found} {IMAGE_TOKEN} in its conversations; write one "
            f"{IMAGE_TOKEN} where each image belongs"
        )
    found = sum(turn.text.count(VIDEO_TOKEN) for turn in record.turns) if record.videos else 0
    if found != len(record.videos):
        raise FaultError(
            f"has {len(record.videos)} videos, but {found} {VIDEO_TOKEN} in its conversations; write one {VIDEO_TOKEN} "
            "where each video belongs"
        )
