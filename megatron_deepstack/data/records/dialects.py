"""The dialects in which conversations about images are written. A record's keys show which one it uses.


    LLaVA          image, conversations: [{from: human | gpt, value}]
    ShareGPT       images, system, conversations: [{from: system | human | gpt, value}]
    ms-swift       images, messages: [{role: system | user | assistant, content, loss}]; or query, response, history
    LLaMA-Factory  images, system, messages or conversations; or instruction, input, output, history
    OpenAI         messages: [{role, content: text, or [{type: text, text}, {type: image_url, image_url: {url}}]}]

Names of roles and of images may come from different dialects, since real files mix them. An answer is learned unless
`loss`, `train` or `weight` of its turn says otherwise. A system text is the record's `system`, or its first turn.
Anything else that a record, a turn or a part of its content holds is a fault: see `keys`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from megatron_deepstack.data.records.keys import FaultError, check_keys, how_to_ignore, without
from megatron_deepstack.data.records.tools import (
    CALL_ROLES,
    RESPONSE_ROLES,
    call_in_text,
    response,
    with_calls,
    with_tools,
)
from megatron_deepstack.data.records.turns import VIDEO_TOKEN, Role, Turn, Video, is_whole_text
from megatron_deepstack.data.records.videos import VIDEO_KEYS as _VIDEO_KEYS
from megatron_deepstack.data.records.videos import read_video, read_videos
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN

TALK_KEYS: Final = ("conversations", "messages")
"""Keys under which a record may hold its turns."""
_SINGLE_FORMS: Final = {"output": ("instruction", "input"), "response": ("query",)}
"""Records that hold one question and its answer: the key of the answer, and those of the question's lines."""
_HISTORY: Final = "history"
_EVERYWHERE: Final = ("id", "image", "images", "system")
_ROLES: Final = {
    "human": Role.HUMAN,
    "user": Role.HUMAN,
    "gpt": Role.GPT,
    "assistant": Role.GPT,
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
}
_TOOL_ROLES: Final = (*RESPONSE_ROLES, *CALL_ROLES)
_SPEAKER_KEYS: Final = (("from", "value"), ("role", "content"))
"""The keys of a turn for who speaks and for what is said, as LLaVA and as OpenAI name them."""
_LEARNED_KEYS: Final = ("loss", "train", "weight")
_TEXT_PARTS: Final = ("text", "input_text", "output_text")
_IMAGE_PARTS: Final = ("image", "image_url", "input_image")
_PATH_KEYS: Final = ("path", "url", "image", "image_url")
_VIDEO_PART: Final = "video"
_FOREIGN: Final = re.compile(r"<\|?(?P<medium>video|audio|speech)(?:_pad)?\|?>", re.IGNORECASE)
"""Placeholders of media that are not read."""


@dataclass(slots=True)
class _Named:
    """What the turns of a record name."""

    takes_videos: bool
    images: list[str] = field(default_factory=list)
    videos: list[Video] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A record, after reading it from any dialect."""

    images: tuple[str, ...]
    """As the record names them, in the order of their placeholders."""
    turns: tuple[Turn, ...]
    videos: tuple[Video, ...] = ()
    """In the order of their placeholders."""


def holds_talk(item: Any) -> bool:
    """Whether the JSON value holds a conversation, with or without faults."""
    if not isinstance(item, dict):
        return False
    single = any(item.get(answer) and any(item.get(key) for key in asked) for answer, asked in _SINGLE_FORMS.items())
    return single or any(item.get(key) is not None for key in TALK_KEYS)


def read_conversation(
    record: Mapping[str, Any], ignored: Collection[str] = (), *, writes_tools: bool = False, takes_videos: bool = False
) -> Conversation:
    """Read the conversation in a record.

    Args:
        record: The record's JSON object.
        ignored: Keys to pass over at every level of the record, and placeholders of other media to treat as plain text.
        writes_tools: Whether the template writes tools; if not, they are a fault.
        takes_videos: Whether the model and the template take videos; if not, they are a fault.

    Returns:
        Its turns, with the system text first if there is one, and its images.

    Raises:
        FaultError: The record is in no known dialect, or holds something that is not read; the message names it.
    """
    item = without(record, ignored)
    form = _form(item, record)
    more = (*(("tools",) if writes_tools else ()), *(_VIDEO_KEYS if takes_videos else ()))
    everywhere = (*_EVERYWHERE, *more)
    check_keys(item, (*everywhere, form, *((*_SINGLE_FORMS[form], _HISTORY) if form in _SINGLE_FORMS else ())))
    named = _Named(takes_videos=takes_videos)
    turns = (
        list(_single(item, form)) if form in _SINGLE_FORMS else list(_talk(item[form], ignored, named, writes_tools))
    )
    turns = _with_system(item.get("system"), turns)
    if writes_tools:
        turns = with_tools(turns, item.get("tools"))
        if not all(is_whole_text(turn.text) for turn in turns):
            raise FaultError("a tool or a call of one holds half of a surrogate pair, which is no character")
    if all(not turn.learned for turn in turns if turn.role is Role.GPT) and any(t.role is Role.GPT for t in turns):
        raise FaultError("none of its answers is to be learned; leave the record out")
    found = _videos(item, named) if takes_videos else ()
    _check_foreign(turns, record, {*ignored, VIDEO_TOKEN} if found else ignored)
    return Conversation(_images(item, named.images), tuple(turns), found)


def named_images(record: Mapping[str, Any]) -> list[str]:
    """The images that a record names, in order; empty if the record cannot be read."""
    named = _Named(takes_videos=True)
    try:
        item = without(record, ())
        for key in TALK_KEYS:
            if key in item:
                list(_talk(item[key], (), named, True))
        return list(_images(item, named.images))
    except FaultError:
        return []


def _form(item: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The key that holds the conversation, or its last answer."""
    found = [key for key in (*TALK_KEYS, *_SINGLE_FORMS) if key in item]
    if len(found) > 1:
        raise FaultError(f"holds a conversation more than once, as {' and '.join(f'`{key}`' for key in found)}")
    if not found:
        lists = [key for key, value in item.items() if isinstance(value, list) and value and holds_talk(value[0])]
        if lists:
            raise FaultError(f"is one object whose `{lists[0]}` holds records; write that list alone into the file")
        check_keys(item, _EVERYWHERE)
        there = kind_of(record.get(TALK_KEYS[0]))
        raise FaultError(f"has no conversations: found {there}, a list of turns was expected (or `messages`)")
    return found[0]


def _single(item: Mapping[str, Any], form: str) -> Iterator[Turn]:
    """The turns of a record with one question, and perhaps earlier ones in its history."""
    for number, pair in enumerate(_list_of(item.get(_HISTORY, []), "`history`")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise FaultError(f"item {number} of `history` is {kind_of(pair)}, a question and its answer were expected")
        yield Turn(Role.HUMAN, _text(pair[0], f"item {number} of `history`"))
        yield Turn(Role.GPT, _text(pair[1], f"item {number} of `history`"))
    asked = [_text(item[key], f"`{key}`") for key in _SINGLE_FORMS[form] if key in item]
    if not asked:
        raise FaultError(f"has an answer, `{form}`, but no question ({' or '.join(_SINGLE_FORMS[form])})")
    yield Turn(Role.HUMAN, "\n".join(asked))
    yield Turn(Role.GPT, _text(item[form], f"`{form}`"))


def _talk(value: Any, ignored: Collection[str], named: _Named, writes_tools: bool) -> Iterator[Turn]:
    """The turns of a list; images that they name are added to `named`."""
    for number, turn in enumerate(_list_of(value, "its conversation")):
        yield _usual_turn(turn, ignored) or _turn(turn, f"turn {number}", ignored, named, writes_tools)


def _usual_turn(turn: Any, ignored: Collection[str]) -> Turn | None:
    """The quick path for a turn that holds only a role and a text, as nearly all do; None for any other.

    It takes a third of the time of `_turn`.
    """
    if type(turn) is not dict or len(turn) != 2 or ignored:
        return None
    for speaker, said in _SPEAKER_KEYS:
        name, text = turn.get(speaker), turn.get(said)
        if isinstance(name, str) and isinstance(text, str) and name in _ROLES and text.isascii():
            return Turn(_ROLES[name], text)
    return None


def _turn(turn: Any, where: str, ignored: Collection[str], named: _Named, writes_tools: bool) -> Turn:
    speaker, said = _speaker_keys(turn)
    if writes_tools and isinstance(turn, dict):
        tool_turn = _tool_turn(turn, where, ignored, named)
        if tool_turn is not None:
            return tool_turn
    if not isinstance(turn, dict) or not isinstance(turn.get(said), str | list):
        calls = isinstance(turn, dict) and sorted({"tool_calls", "function_call"} & without(turn, ignored).keys())
        if calls:
            check_keys(calls, (), where)
        raise FaultError(f"{where} is not an object with a text as `{said}`")
    held = without(turn, ignored)
    role = _role(turn.get(speaker), where)
    check_keys(held, (speaker, said, *_LEARNED_KEYS), where)
    return Turn(role, _content(turn[said], where, ignored, named), _learned(held, role, where))


def _tool_turn(turn: dict[str, Any], where: str, ignored: Collection[str], named: _Named) -> Turn | None:
    """A turn that calls tools, or that holds a tool's response; None for any other."""
    speaker, said = _speaker_keys(turn)
    held, name = without(turn, ignored), turn.get(speaker)
    if name in RESPONSE_ROLES:
        check_keys(held, (speaker, said, "tool_call_id", "name"), where)
        return Turn(Role.HUMAN, response(_content(held.get(said, ""), where, ignored, named)))
    if name in CALL_ROLES:
        check_keys(held, (speaker, said, *_LEARNED_KEYS), where)
        return Turn(Role.GPT, call_in_text(_text(turn.get(said), where), where), _learned(held, Role.GPT, where))
    if "tool_calls" not in held:
        return None
    if _role(name, where) is not Role.GPT:
        raise FaultError(f"{where} calls tools; only what the assistant says can")
    check_keys(held, (speaker, said, "tool_calls", *_LEARNED_KEYS), where)
    text = _content(held.get(said, ""), where, ignored, named)
    return Turn(Role.GPT, with_calls(text, held["tool_calls"], where), _learned(held, Role.GPT, where))


def _speaker_keys(turn: Any) -> tuple[str, str]:
    """The keys of a turn for who speaks and for what is said."""
    has_role = isinstance(turn, dict) and "role" in turn and "from" not in turn
    return _SPEAKER_KEYS[has_role]


def _role(name: Any, where: str) -> Role:
    if isinstance(name, str) and name in _ROLES:
        return _ROLES[name]
    if name in _TOOL_ROLES:
        raise FaultError(
            f"{where} is of the role {name!r}: this template does not write tool calls; leave the record out, or use "
            "data.template=qwen3_vl"
        )
    raise FaultError(f"{where} has the unknown role {name!r}; known: {', '.join(_ROLES)}")


def _learned(turn: Mapping[str, Any], role: Role, where: str) -> bool:
    """Whether an answer is learned, as its turn says."""
    flags = {key: turn[key] for key in _LEARNED_KEYS if key in turn}
    for key, flag in flags.items():
        if isinstance(flag, str) or flag not in (0, 1):
            raise FaultError(f"{where} has {flag!r} as `{key}`; true or false (1 or 0) was expected")
        if flag and role is not Role.GPT:
            raise FaultError(f"{where} is to be learned by its `{key}`; only what the assistant says can be")
    if len({bool(flag) for flag in flags.values()}) > 1:
        raise FaultError(f"{where} is to be learned and not to be, by its {' and '.join(f'`{key}`' for key in flags)}")
    return all(flags.values())


def _content(value: str | list[Any], where: str, ignored: Collection[str], named: _Named) -> str:
    """What a turn says, as one text: the parts of a list one after the other, a placeholder for each image."""
    if isinstance(value, str):
        return _text(value, where)
    return "".join(_part(part, f"part {number} of {where}", ignored, named) for number, part in enumerate(value))


def _part(part: Any, where: str, ignored: Collection[str], named: _Named) -> str:
    if isinstance(part, str):
        return _text(part, where)
    if not isinstance(part, dict):
        raise FaultError(f"{where} is {kind_of(part)}, an object with a `type` was expected")
    held = without(part, ignored)
    kind = part.get("type", next((key for key in ("text", "image", _VIDEO_PART) if key in part), None))
    if kind in _TEXT_PARTS:
        check_keys(held, ("type", "text"), where)
        return _text(part.get("text"), where)
    if kind in _IMAGE_PARTS:
        check_keys(held, ("type", *_PATH_KEYS, "detail"), where)
        paths = [held[key] for key in _PATH_KEYS if key in held]
        if len(paths) > 1:
            raise FaultError(f"{where} names its image more than once")
        named.images += [_path(path, where) for path in paths]
        return IMAGE_TOKEN
    if kind == _VIDEO_PART and named.takes_videos:
        named.videos.append(read_video({**held, "video": part.get("video")}, where))
        return VIDEO_TOKEN
    what = "text, images and videos" if named.takes_videos else "text and images"
    raise FaultError(f"{where} is of the type {kind!r}; only {what} are read")


def _videos(item: Mapping[str, Any], named: _Named) -> tuple[Video, ...]:
    """The videos of a record, which must name them in one place, or alike in both."""
    found, in_turns = read_videos(item), tuple(named.videos)
    if found and in_turns and found != in_turns:
        raise FaultError("names its videos differently in its turns and beside them; name them in one place")
    return found or in_turns


def _images(item: Mapping[str, Any], named: list[str]) -> tuple[str, ...]:
    """The images of a record, which must name them in one place, or alike in all places."""
    places = {f"`{key}`": _path_list(item[key], f"`{key}`") for key in ("image", "images") if key in item}
    if named:
        places["its turns"] = named
    lists = list(places.values())
    if any(other != lists[0] for other in lists[1:]):
        raise FaultError(f"names its images differently in {' and '.join(places)}; name them in one place")
    return tuple(lists[0]) if lists else ()


def _path_list(value: Any, where: str) -> list[str]:
    return [_path(path, where) for path in (value if isinstance(value, list) else [value])]


def _path(value: Any, where: str) -> str:
    """The path of an image: a text, or an object that holds one."""
    if isinstance(value, dict):
        if value.get("bytes"):
            raise FaultError(f"{where} holds an image's bytes; write them into a file, and give its path")
        check_keys(without(value, ()), (*_PATH_KEYS, "detail"), where)
        value = next((value[key] for key in _PATH_KEYS if value.get(key)), None)
    if isinstance(value, str) and value.startswith("data:"):
        raise FaultError(f"{where} holds an image itself ({value[:20]}...); write it into a file, and give its path")
    if not isinstance(value, str) or not value or "\0" in value:
        raise FaultError(f"{where} holds {value!r}; a path, or a list of paths, was expected")
    return _text(value.removeprefix("file://"), where)


def _with_system(system: Any, turns: list[Turn]) -> list[Turn]:
    """The turns with the record's system text before them; if it is empty, the template's own text is used."""
    late = next((number for number, turn in enumerate(turns) if number and turn.role is Role.SYSTEM), None)
    if late is not None:
        raise FaultError(f"turn {late} has the role system, which only the first turn can have")
    own = turns[0].text if turns and turns[0].role is Role.SYSTEM else ""
    talk = turns[1:] if turns and turns[0].role is Role.SYSTEM else turns
    text = "" if system is None else _text(system, "`system`")
    if own.strip() and text.strip() and own != text:
        raise FaultError("has two system texts, `system` and its first turn")
    given = text if text.strip() else own
    return [Turn(Role.SYSTEM, given), *talk] if given.strip() else talk


def _check_foreign(turns: Sequence[Turn], record: Mapping[str, Any], ignored: Collection[str]) -> None:
    """Raise FaultError for a placeholder of a medium that is not read: the model would learn its characters.

    The same words occur in texts about web pages. They count as a placeholder if the record names such a medium. They
    also count if a question begins or ends with them, or has them on a line of their own, and no closing tag follows.
    """
    for turn in turns:
        for found in _FOREIGN.finditer(turn.text) if "<" in turn.text else ():
            medium, mark = found["medium"].lower(), found.group()
            named = record.get(medium) or record.get(f"{medium}s")
            if mark in ignored or not (named or (turn.role is not Role.GPT and _stands_alone(turn.text, found))):
                continue
            raise FaultError(
                f"holds {mark}, a placeholder of a medium that is not read; leave the record out, or, if it is plain "
                f"text, set {how_to_ignore([mark])}"
            )


def _stands_alone(text: str, found: re.Match[str]) -> bool:
    before, after = text[: found.start()].rstrip(" \t"), text[found.end() :].lstrip(" \t")
    if f"</{found['medium'].lower()}" in text.lower():
        return False
    own_line = before.endswith("\n") and after.startswith("\n")
    return not before.strip() or not after.strip() or own_line


def _list_of(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise FaultError(f"{where} is {kind_of(value)}, a list was expected")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise FaultError(f"{where} is {kind_of(value)}, a text was expected")
    if not is_whole_text(value):
        raise FaultError(f"{where} holds half of a surrogate pair, which is no character")
    return value


def kind_of(value: Any) -> str:
    """The kind of a JSON value, in words for a message."""
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "nothing"}
    return "an empty list" if value == [] else kinds.get(type(value), repr(value))
