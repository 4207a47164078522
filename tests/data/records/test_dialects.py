"""Every dialect is read as it means it, and whatever is not read is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_deepstack.data.records.dialects import read_conversation
from megatron_deepstack.data.records.keys import FaultError
from megatron_deepstack.data.records.record import Faults, Record, RecordRules
from megatron_deepstack.data.records.record_files import read_record_file
from megatron_deepstack.data.records.turns import Role, Turn, Video
from megatron_deepstack.data.text.conversation import Template
from megatron_deepstack.errors import DataError

ASKED, ANSWERED = "<image>\nWhat is it?", "A page."
TALK = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]
MESSAGES = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
FRENCH = {"role": "system", "content": "Answer in French."}
EXPECTED = (Turn(Role.HUMAN, ASKED), Turn(Role.GPT, ANSWERED))
SYSTEM = Turn(Role.SYSTEM, "Answer in French.")


def read(
    *items: Any, template: Template = Template.V1, ignore: tuple[str, ...] = (), tmp_path: Path
) -> tuple[Record, ...]:
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in items))
    faults = Faults()
    with open(path, "rb") as file:
        found = read_record_file(file, path.name, RecordRules(template, "/photos", frozenset(ignore)), faults)
    faults.raise_if_any()
    return found.records


def parts(*content: Any) -> Any:
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": ANSWERED}]


DIALECTS = {
    "LLaVA": {"image": "p.jpg", "conversations": TALK},
    "LLaVA, harmless keys": {"image": "p.jpg", "conversations": TALK, "model": "gpt-4", "width": 640, "source": "x"},
    "LLaVA, empty columns": {"image": "p.jpg", "conversations": TALK, "video": None, "tools": "", "audios": []},
    "ShareGPT": {"images": ["p.jpg"], "conversations": TALK},
    "ShareGPT, one image as a text": {"images": "p.jpg", "conversations": TALK},
    "ms-swift": {"images": ["p.jpg"], "messages": MESSAGES},
    "ms-swift, images as objects": {"images": [{"path": "p.jpg", "bytes": None}], "messages": MESSAGES},
    "ms-swift, one question": {"images": ["p.jpg"], "query": ASKED, "response": ANSWERED, "history": []},
    "LLaMA-Factory, conversations": {
        "images": ["p.jpg"],
        "system": "",
        "tools": "",
        "conversations": [{"role": "human", "content": ASKED}, {"role": "gpt", "content": ANSWERED}],
    },
    "LLaMA-Factory, alpaca": {
        "images": ["p.jpg"],
        "instruction": "<image>",
        "input": "What is it?",
        "output": ANSWERED,
    },
    "LLaMA-Factory, alpaca without instruction": {
        "images": ["p.jpg"],
        "instruction": "",
        "input": ASKED,
        "output": ANSWERED,
    },
    "names of roles mixed": {"image": "p.jpg", "conversations": [TALK[0], MESSAGES[1]]},
    "OpenAI, image_url": {
        "messages": parts(
            {"type": "image_url", "image_url": {"url": "p.jpg", "detail": "high"}},
            {"type": "text", "text": "\nWhat is it?"},
        )
    },
    "OpenAI, image_url as a text": {
        "messages": parts({"type": "image_url", "image_url": "p.jpg"}, {"type": "text", "text": "\nWhat is it?"})
    },
    "OpenAI, file URL": {
        "messages": parts(
            {"type": "image_url", "image_url": {"url": "file:///photos/p.jpg"}}, {"text": "\nWhat is it?"}
        )
    },
    "parts, image": {"messages": parts({"type": "image", "image": "p.jpg"}, {"type": "text", "text": "\nWhat is it?"})},
    "parts, no types": {"messages": parts({"image": "p.jpg"}, {"text": "\nWhat is it?"})},
    "parts, images beside them": {
        "images": ["p.jpg"],
        "messages": parts({"type": "image"}, {"type": "text", "text": "\nWhat is it?"}),
    },
    "parts, a text among them": {"images": ["p.jpg"], "messages": parts({"type": "image"}, "\nWhat is it?")},
    "both keys of images, alike": {"image": "p.jpg", "images": ["p.jpg"], "conversations": TALK},
}


@pytest.mark.parametrize("name", DIALECTS)
def test_dialects(name: str, tmp_path: Path) -> None:
    assert read({"id": "a", **DIALECTS[name]}, tmp_path=tmp_path) == (Record("a", ("p.jpg",), EXPECTED),)


@pytest.mark.parametrize(
    "item",
    [
        {"system": "Answer in French.", "messages": MESSAGES},
        {"messages": [FRENCH, *MESSAGES]},
        {"messages": [{**FRENCH, "role": "developer"}, *MESSAGES]},
        {"conversations": [{"from": "system", "value": "Answer in French."}, *TALK]},
        {"system": "Answer in French.", "messages": [FRENCH, *MESSAGES]},
        {"system": "Answer in French.", "instruction": ASKED, "output": ANSWERED},
        {"system": "Answer in French.", "messages": [{**FRENCH, "content": ""}, *MESSAGES]},
    ],
    ids=["key", "message", "developer", "turn", "both alike", "alpaca", "empty message"],
)
def test_system_texts(item: Any, tmp_path: Path) -> None:
    (found,) = read({"id": "a", "image": "p.jpg", **item}, tmp_path=tmp_path)
    assert found.turns == (SYSTEM, *EXPECTED)


@pytest.mark.parametrize("system", ["", None, " \n"])
def test_an_empty_system_text_leaves_the_templates_own(system: Any, tmp_path: Path) -> None:
    (found,) = read({"id": "a", "image": "p.jpg", "system": system, "messages": MESSAGES}, tmp_path=tmp_path)
    assert found.turns == EXPECTED


@pytest.mark.parametrize(
    ("flag", "learned"),
    [
        ({"loss": False}, False),
        ({"loss": True}, True),
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"train": False}, False),
        ({"loss": None}, True),
        ({"loss": False, "weight": 0.0}, False),
    ],
    ids=str,
)
def test_answers_that_are_not_learned(flag: Any, learned: bool, tmp_path: Path) -> None:
    messages = [MESSAGES[0], {**MESSAGES[1], **flag}, {"role": "user", "content": "And?"}, MESSAGES[1]]
    (found,) = read({"id": "a", "images": ["p.jpg"], "messages": messages}, tmp_path=tmp_path)
    assert [turn.learned for turn in found.turns if turn.role is Role.GPT] == [learned, True]


def test_history_comes_before_the_question(tmp_path: Path) -> None:
    item = {"instruction": "And now?", "output": "Rain.", "history": [["Hi", "Hello."], ["Weather?", "Sun."]]}
    (found,) = read(item, tmp_path=tmp_path)
    assert [turn.text for turn in found.turns] == ["Hi", "Hello.", "Weather?", "Sun.", "And now?", "Rain."]


def test_records_without_id_get_their_number(tmp_path: Path) -> None:
    item = {"image": "p.jpg", "conversations": TALK}
    assert [found.id for found in read(item, {**item, "id": None}, {**item, "id": 0}, tmp_path=tmp_path)] == [
        "records.jsonl:0",
        "records.jsonl:1",
        "0",
    ]


GOOD = {"id": "g", "image": "p.jpg", "conversations": TALK}


def talk(*turns: Any, **fields: Any) -> Any:
    return {"id": "b", "image": "p.jpg", "messages": list(turns), **fields}


FAULTS = {
    "video": (
        {**GOOD, "video": "clip.mp4"},
        "holds `video`, not read here: only model.variant=qwen3_vl with data.template=qwen3_vl takes videos",
    ),
    "videos and audio": (
        {**GOOD, "videos": ["c"], "audio": "s"},
        "holds `audio`, `videos`, not read here: images and videos are",
    ),
    "an unknown key": ({**GOOD, "depth_map": "d.png"}, "holds `depth_map`, not read here"),
    "a near key": ({"id": "b", "img": "p.jpg", "conversations": TALK}, "holds `img`, not read here"),
    "no talk, an unknown key": ({"id": "b", "conversation": TALK}, "holds `conversation`, not read here"),
    "tools": ({**GOOD, "tools": "[{}]"}, "holds `tools`, not read here: this template does not write tool calls"),
    "preferences": ({**GOOD, "rejected_response": "No."}, "`rejected_response`, .*: preferences are not learned"),
    "input beside conversations": ({**GOOD, "input": "A text."}, "holds `input`, not read here"),
    "two conversations": ({**GOOD, "messages": MESSAGES}, "conversation more than once, as `conversations` and `mess"),
    "two lists of images": ({**GOOD, "images": ["q.jpg"]}, "names its images differently in `image` and `images`"),
    "images here and there": (
        {"id": "b", "images": ["q.jpg"], "messages": parts({"type": "image", "image": "p.jpg"})},
        "names its images differently in `images` and its turns",
    ),
    "images without placeholder": (
        {"id": "b", "images": ["p.jpg"], "conversations": [{"from": "human", "value": "What?"}, TALK[1]]},
        "has 1 images, but 0 <image> in its conversations; write one <image> where each image belongs",
    ),
    "bytes": ({**GOOD, "image": [{"bytes": "iVBOR"}]}, "`image` holds an image's bytes; write them into a file"),
    "a data URL": (
        {"id": "b", "messages": parts({"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}})},
        r"part 0 of turn 0 holds an image itself \(data:image/png;base.*write it into a file",
    ),
    "a URL": ({**GOOD, "image": "https://x.org/a.jpg"}, "`image` is the URL 'https://x.org/a.jpg'"),
    "a key of a turn": (talk({**MESSAGES[0], "clip": "c.mp4"}, MESSAGES[1]), "turn 0 holds `clip`, not read here"),
    "loss scale": (talk(MESSAGES[0], {**MESSAGES[1], "loss_scale": 0.5}), "turn 1 holds `loss_scale`, not read"),
    "a part of another medium": (
        {"id": "b", "messages": parts({"type": "video", "video": "c.mp4"})},
        "part 0 of turn 0 is of the type 'video'; only text and images are read",
    ),
    "a key of a part": (
        {"id": "b", "messages": parts({"type": "image", "image": "p.jpg", "max_pixels": 9})},
        "part 0 of turn 0 holds `max_pixels`, not read here",
    ),
    "tool role": (talk(MESSAGES[0], {"role": "tool", "content": "42"}), "turn 1 is of the role 'tool': this template"),
    "function call": (
        {**GOOD, "conversations": [TALK[0], {"from": "function_call", "value": "{}"}]},
        "turn 1 is of the role 'function_call': this template does not write tool calls",
    ),
    "tool calls": (
        talk(MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}),
        "turn 1 holds `tool_calls`, not read here: this template does not write tool calls",
    ),
    "two systems": (talk(FRENCH, *MESSAGES, system="Answer in German."), "has two system texts"),
    "a late system": (talk(*MESSAGES, FRENCH), "turn 2 has the role system, which only the first turn can have"),
    "an image in the system": (
        talk({**FRENCH, "content": "<image>"}, {"role": "user", "content": "?"}, MESSAGES[1]),
        "its system text holds an <i",
    ),
    "a loss of no kind": (talk(MESSAGES[0], {**MESSAGES[1], "loss": "no"}), "turn 1 has 'no' as `loss`; true or false"),
    "a weight between": (talk(MESSAGES[0], {**MESSAGES[1], "weight": 0.5}), "turn 1 has 0.5 as `weight`"),
    "a question to learn": (talk({**MESSAGES[0], "loss": True}, MESSAGES[1]), "turn 0 is to be learned by its `loss`"),
    "two minds": (talk(MESSAGES[0], {**MESSAGES[1], "loss": True, "weight": 0}), "to be learned and not to be, by its"),
    "nothing learned": (talk(MESSAGES[0], {**MESSAGES[1], "loss": False}), "none of its answers is to be learned"),
    "history of no pairs": (
        {"instruction": "a", "output": "b", "history": ["c"]},
        "item 0 of `history` is a text, a question and its answer were expected",
    ),
    "an answer alone": (
        {"id": "b", "output": "b"},
        r"has an answer, `output`, but no question \(instruction or input\)",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(name: str, tmp_path: Path) -> None:
    item, fault = FAULTS[name]
    with pytest.raises(
        DataError, match=rf"1 of 2 records cannot be used(.|\n)*records.jsonl, record 1 at line 2.*{fault}"
    ):
        read(GOOD, item, tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("<video>\nWhat happens?", True),
        ("What happens?\n<video>", True),
        ("Look:\n<audio>\nWhat is said?", True),
        ("<|video|>What happens?", True),
        ("<|video_pad|>\nWhat?", True),
        ("What does the <video> tag do?", False),
        ("<video>\n<source src='a.mp4'>\n</video>\nWhat is wrong?", False),
        ("<video controls> and text", False),
    ],
)
def test_placeholders_of_other_media(text: str, refused: bool, tmp_path: Path) -> None:
    item = {"id": "v", "conversations": [{"from": "human", "value": text}, TALK[1]]}
    if not refused:
        assert read(item, tmp_path=tmp_path)[0].turns[0].text == text
        return
    with pytest.raises(DataError, match="a placeholder of a medium that is not read") as caught:
        read(item, tmp_path=tmp_path)
    mark = str(caught.value).split("holds ")[1].split(",")[0]
    assert f"""'data.ignore_keys=["{mark}"]'""" in str(caught.value)
    assert read(item, ignore=(mark,), tmp_path=tmp_path)[0].turns[0].text == text


def test_a_record_of_a_video_is_refused_wherever_its_placeholder_stands(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What happens in <video> here?"}, TALK[1]]
    item = {"id": "v", "video": "clip.mp4", "conversations": turns}
    with pytest.raises(DataError, match="holds <video>, a placeholder"):
        read(item, ignore=("video",), tmp_path=tmp_path)


def test_ignored_keys_are_passed_over_wherever_they_stand(tmp_path: Path) -> None:
    item = talk({**MESSAGES[0], "clip": "c"}, {**MESSAGES[1], "clip": "c"}, clip="c", system="Answer in French.")
    (found,) = read(item, ignore=("clip", "system"), tmp_path=tmp_path)
    assert found.turns == EXPECTED


def test_keys_that_nothing_reads_are_counted_with_what_to_do(tmp_path: Path) -> None:
    items = [{**GOOD, "video": "c.mp4"} for _ in range(12)] + [{**GOOD, "depth": 1}, GOOD]
    with pytest.raises(DataError) as caught:
        read(*items, tmp_path=tmp_path)
    said = str(caught.value)
    assert said.startswith("13 of 14 records cannot be used")
    assert "... and 3 more" in said
    assert "Not read: `video` in 12 records, `depth` in 1 records." in said
    assert said.endswith("data.ignore_keys=[video,depth]")


def test_plain_has_no_place_for_a_system_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has a system text, which template plain has no place for \(data.template\)"):
        read({**GOOD, "system": "Answer in French."}, template=Template.PLAIN, tmp_path=tmp_path)


def test_videos_of_parts_stand_where_they_are() -> None:
    """A part may be a file, or a list of frames with their rate; the record may name the same videos beside it."""
    clip, frames = {"type": "video", "video": "c.mp4"}, {"type": "video", "video": ["1.jpg", "2.jpg"], "fps": 2}
    content = [{"type": "text", "text": "First "}, clip, {"type": "image", "image": "p.jpg"}, frames, "which?"]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "The second."}]}
    found = read_conversation(record, writes_tools=True, takes_videos=True)
    assert found.turns[0].text == "First <video><image><video>which?"
    assert found.videos == (Video(("c.mp4",), False, None), Video(("1.jpg", "2.jpg"), True, 2.0))
    assert found.images == ("p.jpg",)
    named = {**record, "videos": ["c.mp4", {"video": ["1.jpg", "2.jpg"], "fps": 2}]}
    assert read_conversation(named, writes_tools=True, takes_videos=True) == found
    with pytest.raises(FaultError, match="names its videos differently in its turns and beside them"):
        read_conversation({**record, "videos": ["d.mp4"]}, writes_tools=True, takes_videos=True)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "video", "video": []}, "part 0 of turn 0 holds a video without frames: an empty list"),
        ({"type": "video"}, "part 0 of turn 0 holds None; a path, or a list of paths of frames, was expected"),
        ({"type": "video", "video": "c.mp4", "fps": 0}, "part 0 of turn 0 has 0 frames per second"),
        ({"type": "video", "video": "c.mp4", "max_pixels": 9}, "part 0 of turn 0 holds `max_pixels`"),
        ({"type": "audio", "audio": "c.wav"}, "of the type 'audio'; only text, images and videos are read"),
        ({"type": "video", "video": "\ud800.mp4"}, r"part 0 of turn 0 holds '\\ud800.mp4'; a path"),
    ],
    ids=["no-frames", "nothing", "rate", "key", "audio", "half-a-pair"],
)
def test_faulty_videos_of_parts(part: dict[str, object], words: str) -> None:
    record = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(FaultError, match=words):
        read_conversation(record, writes_tools=True, takes_videos=True)


def test_half_a_surrogate_pair_in_tools() -> None:
    """Their JSON is written into the text, where an escape becomes what no tokenizer takes."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    call = {"role": "tool_call", "content": r'{"name": "f", "arguments": {"x": "\ud800"}}'}
    for record in ({"tools": [{"name": "\ud800"}], "messages": talk}, {"messages": [talk[0], call]}):
        with pytest.raises(FaultError, match="half of a surrogate pair"):
            read_conversation(record, writes_tools=True)
