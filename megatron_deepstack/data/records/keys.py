"""Keys of records: those that are read, those that are harmless, and the message about all others.

A key that nothing reads may hold what a sample is about: a video, an instruction, a tool. So every key that holds
something must be read, or be known to be harmless, or be named in `data.ignore_keys`; any other key is a fault of its
record.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

HARMLESS_KEYS: Final = frozenset(
    {
        *("id", "idx", "index", "uid", "uuid", "hash", "sample_id", "question_id", "image_id"),
        *("model", "source", "data_source", "dataset", "dataset_name", "data_name", "split", "subset"),
        *("category", "type", "task", "task_type", "topic", "tags", "lang", "language", "license"),
        *("date", "timestamp", "created_at", "updated_at", "version", "meta", "metadata"),
        *("width", "height", "image_width", "image_height", "image_size"),
        *("__key__", "__url__", "__local_path__", "blip_caption"),
    }
)
"""Keys that describe a record and hold no content: names, origin, date, the size of its image. They are passed over."""

_MEDIA: Final = ("audio", "audios", "speech", "sound", "point_cloud")
_TOOLS: Final = ("tools", "tool_calls", "tool_call", "tool_call_id", "functions", "function_call")
_PREFERENCES: Final = ("chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag", "label")
_REASONS: Final[dict[str, str]] = {
    **dict.fromkeys(("video", "videos"), "only model.variant=qwen3_vl with data.template=qwen3_vl takes videos"),
    **dict.fromkeys(_MEDIA, "images and videos are the only media that are read"),
    **dict.fromkeys(_TOOLS, "this template does not write tool calls (data.template=qwen3_vl does)"),
    **dict.fromkeys(_PREFERENCES, "preferences are not learned"),
}


class FaultError(Exception):
    """What is wrong with one record; the message does not name the record."""

    def __init__(self, text: str, keys: Collection[str] = ()) -> None:
        super().__init__(text)
        self.keys = tuple(keys)
        """Keys that nothing reads, if that is the fault."""


class RepeatedKeys(dict[str, Any]):
    """A JSON object in which a key stands more than once: all but its last value are lost."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        """`pairs` are all its keys with their values, in order."""
        super().__init__(pairs)
        self.repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]


def as_object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """What to read a JSON object as (`object_pairs_hook`), so that `without` can tell whether a key is repeated.

    Args:
        pairs: Its keys with their values.

    Returns:
        A dict, or RepeatedKeys.
    """
    found = dict(pairs)
    return found if len(found) == len(pairs) else RepeatedKeys(pairs)


def holds_nothing(value: Any) -> bool:
    """Whether the value is empty, like an unused column of a table that was written as JSON."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def without(item: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """An object without the keys to be passed over, and without the keys that hold nothing.

    Args:
        item: The object, a part of a record.
        ignored: Names of the keys to be passed over.

    Returns:
        A new dict with the remaining keys, in their order.

    Raises:
        FaultError: A key that is not to be passed over stands in the object more than once.
    """
    if isinstance(item, RepeatedKeys) and (twice := [key for key in item.repeated if key not in ignored]):
        raise FaultError(f"holds the key `{twice[0]}` more than once in one object; keep one of them")
    return {key: value for key, value in item.items() if key not in ignored and not holds_nothing(value)}


def check_keys(found: Collection[str], read: Collection[str], where: str = "") -> None:
    """Check that there are no keys except those that are read and the harmless ones.

    Args:
        found: Keys that hold something and are not to be ignored.
        read: Keys that are read in this place.
        where: The place in the record, such as `turn 3`; empty for the record itself.

    Raises:
        FaultError: There are others; the message names them.
    """
    unread = sorted(key for key in found if key not in read and key not in HARMLESS_KEYS)
    if not unread:
        return
    reasons = dict.fromkeys(_REASONS[key] for key in unread if key in _REASONS)
    because = f": {'; '.join(reasons)}" if reasons else ""
    named = ", ".join(f"`{key}`" for key in unread)
    raise FaultError(f"{where + ' ' if where else ''}holds {named}, not read here{because}", unread)


def how_to_ignore(keys: Collection[str]) -> str:
    """What to set in the recipe so that these keys are passed over."""
    plain = all(key.isidentifier() for key in keys)
    listed = ",".join(keys) if plain else ", ".join(json.dumps(key) for key in keys)
    return f"data.ignore_keys=[{listed}]" if plain else f"'data.ignore_keys=[{listed}]'"
