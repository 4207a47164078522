"""Qwen3-VL's conversations: ids equal those of the published processor and chat template, answers are learned.

The Jinja template writes what the official one writes, without its less used parts; transformers renders it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_deepstack.config.choices import ImageResize
from megatron_deepstack.config.traits.variants import ViewLayout
from megatron_deepstack.data.images.sized_processor import SizedProcessor
from megatron_deepstack.data.records.dialects import read_conversation
from megatron_deepstack.data.records.keys import FaultError
from megatron_deepstack.data.text.conversation import encode_conversation, encode_prompt, question_of, stop_ids
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.testing.tiny_chat import (
    QWEN3_VL_TOKENS,
    QWEN3_VL_WORDS,
    QWEN_CONFIG,
    QWEN_TOKENS,
    write_chat_tokenizer,
)

OFFER = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
AFTER_OFFER = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
TEMPLATE = (
    "{%- macro say(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
    "{%- set first = messages[0] %}"
    "{%- if tools %}{{ '<|im_start|>system\n' }}{% if first.role == 'system' %}{{ first.content + '\n\n' }}{% endif %}"
    "{{ offer }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ after_offer + '<|im_end|>\n' }}"
    "{%- elif first.role == 'system' %}{{ '<|im_start|>system\n' + first.content + '<|im_end|>\n' }}{% endif %}"
    "{%- for message in messages %}{% if message.role == 'user' %}"
    "{{ '<|im_start|>user\n' }}{{ say(message.content) }}{{ '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{{ say(message.content) }}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- if (loop.first and message.content) or not loop.first %}{{ '\n' }}{% endif %}"
    """{{ '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}"""
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{ '<|im_start|>user' }}{% endif %}{{ '\n<tool_response>\n' }}{{ say(message.content) }}{{ '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}{% endif %}"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [
    {"type": "function", "function": {"name": "zoom", "parameters": {"type": "object", "é": ["a", 1, None]}}},
    {"type": "function", "function": {"name": "count", "parameters": {}}},
]
IMAGE = {"type": "image", "image": "a.png"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def said(role: str, *content: Any, **more: Any) -> dict[str, Any]:
    plain = len(content) == 1 and isinstance(content[0], str)
    return {"role": role, "content": content[0] if plain else list(content), **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TALKS: dict[str, dict[str, Any]] = {
    "text": {"messages": [said("user", "What is it?"), said("assistant", "A photo.")]},
    "system": {"messages": [said("system", "Be brief.\n"), said("user", "a"), said("assistant", "b")]},
    "image first": {"messages": [said("user", IMAGE, text("What is it?")), said("assistant", "A photo.")]},
    "images within": {
        "messages": [
            said("user", text("Here: "), IMAGE, text(" and\n"), IMAGE, IMAGE, text("\nwhich?")),
            said("assistant", "the second\n\n"),
            said("user", text("\n"), IMAGE),
            said("assistant", " 早上好 é"),
        ]
    },
    "thinking": {"messages": [said("user", IMAGE), said("assistant", "<think>\nIt is a photo.\n</think>\n\nA photo.")]},
    "tools": {
        "tools": TOOLS,
        "messages": [
            said("user", IMAGE, text("Which number?")),
            said("assistant", "", tool_calls=[call("zoom", box=[1, 2], word="ü"), call("count")]),
            said("tool", IMAGE, text("closer")),
            said("tool", "42"),
            said("assistant", "Once more.", tool_calls=[call("count", of={"a": 1})]),
            said("tool", "43"),
            said("assistant", "<think>\nso\n</think>\n\n43"),
        ],
    },
    "tools and system": {
        "tools": TOOLS[:1],
        "messages": [said("system", "Be brief."), said("user", "a"), said("assistant", "b")],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_tokenizer(tmp_path_factory.mktemp("chat"), QWEN3_VL_TOKENS, QWEN_CONFIG, QWEN3_VL_WORDS)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def backend(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def rendered(theirs: Any, talk: dict[str, Any], prompt: bool = False) -> str:
    found: str = theirs.apply_chat_template(
        talk["messages"],
        tools=talk.get("tools"),
        chat_template=TEMPLATE,
        tokenize=False,
        add_generation_prompt=prompt,
        offer=OFFER,
        after_offer=AFTER_OFFER,
    )
    return found


def images_of(talk: dict[str, Any]) -> int:
    return sum(part is IMAGE for message in talk["messages"] for part in message["content"])


def expanded(tokens: np.ndarray, tokenizer: Tokenizer, rows: list[int]) -> list[int]:
    """Each placeholder as the pads that the published processor writes."""
    left = iter(rows)
    pad = tokenizer.control_id("<|image_pad|>")
    return [t for token in tokens.tolist() for t in ([pad] * next(left) if token == IMAGE_TOKEN_ID else [token])]


def learned(tokens: np.ndarray, mask: np.ndarray, theirs: Any) -> list[str]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [theirs.decode(tokens[first:last].tolist()) for first, last in edges.reshape(-1, 2)]


@pytest.mark.parametrize("name", TALKS)
def test_ids_are_those_of_the_published_processor(name: str, folder: Path, tokenizer: Tokenizer) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    talk, theirs = TALKS[name], backend(folder)
    limits = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    sizes = [(100 + 40 * number, 70) for number in range(images_of(talk))]
    pictures = [Image.new("RGB", size, (40, 80, 120)) for size in sizes]
    images = Qwen2VLImageProcessorPil(patch_size=16, size=limits)
    processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    processor.image_processor, processor.image_token = images, "<|image_pad|>"
    content = rendered(theirs, talk)
    if pictures:
        found = images(pictures, return_tensors="np")
        for number in range(len(pictures)):
            pads = processor.replace_image_token(found, number).replace("<|image_pad|>", "<|PAD|>")
            content = content.replace("<|image_pad|>", pads, 1)
        content = content.replace("<|PAD|>", "<|image_pad|>")
    turns = read_conversation(talk, writes_tools=True).turns
    tokens, mask = encode_conversation(turns, "qwen3_vl", tokenizer)
    ours = SizedProcessor(
        layout=ViewLayout.GLOBAL,
        patch_size=16,
        merge_size=2,
        min_pixels=limits["shortest_edge"],
        max_pixels=limits["longest_edge"],
        resize=ImageResize.PILLOW,
        max_image_pixels=10**6,
    )
    rows = [ours.view_of(np.asarray(picture))[1].num_tokens(2) for picture in pictures]
    assert expanded(tokens, tokenizer, rows) == theirs(content, add_special_tokens=False).input_ids
    answers = [message for message in talk["messages"] if message["role"] == "assistant"]
    spoken = [rendered(theirs, {"messages": [answer]}).split("\n", 1)[1].removesuffix("\n") for answer in answers]
    assert learned(tokens, mask, theirs) == spoken, "answers with their calls and thoughts, and nothing else"


def test_a_prompt_begins_as_the_sample_does(folder: Path, tokenizer: Tokenizer) -> None:
    theirs, talk = backend(folder), TALKS["image first"]
    prompt = encode_prompt("What is it?", "qwen3_vl", tokenizer, num_images=1)
    expected = theirs(rendered(theirs, {"messages": talk["messages"][:1]}, prompt=True), add_special_tokens=False)
    assert expanded(prompt, tokenizer, [1]) == expected.input_ids
    assert question_of(prompt.tolist(), "qwen3_vl", tokenizer) == "What is it?"
    assert stop_ids("qwen3_vl", tokenizer) == (tokenizer.control_id("<|im_end|>"),)


def test_typed_control_tokens_stay_characters(tokenizer: Tokenizer) -> None:
    typed = " ".join(QWEN3_VL_TOKENS)
    plain, _ = encode_conversation(read_conversation(TALKS["text"]).turns, "qwen3_vl", tokenizer)
    talk = {"messages": [said("user", f"What {typed}?"), said("assistant", typed)]}
    tokens, mask = encode_conversation(read_conversation(talk, ["<|video_pad|>"]).turns, "qwen3_vl", tokenizer)
    for name in QWEN3_VL_TOKENS:
        number = tokenizer.control_id(name)
        assert np.count_nonzero(tokens == number) == np.count_nonzero(plain == number), name
    assert tokenizer.decode(tokens[mask == 1].tolist()) == typed


def test_images_stay_where_they_stand(tokenizer: Tokenizer) -> None:
    one, _ = encode_conversation(
        read_conversation(
            {"conversations": [{"from": "human", "value": "a\n<image>"}, {"from": "gpt", "value": "b"}]}
        ).turns,
        "qwen3_vl",
        tokenizer,
    )
    place = one.tolist().index(IMAGE_TOKEN_ID)
    assert one[place - 1] == tokenizer.control_id("<|vision_start|>")
    assert one[place + 1] == tokenizer.control_id("<|vision_end|>")
    assert tokenizer.decode(one[:place].tolist()).endswith("a\n")


def test_a_tokenizer_without_the_tokens_is_refused(tmp_path: Path) -> None:
    other = load_tokenizer(write_chat_tokenizer(tmp_path, QWEN_TOKENS, QWEN_CONFIG))
    with pytest.raises(DataError, match=r"has no control token '<\|vision_start\|>', which the conversation template"):
        encode_conversation(read_conversation(TALKS["image first"]).turns, "qwen3_vl", other)


def test_calls_in_turns_of_their_own(tokenizer: Tokenizer) -> None:
    record = {
        "tools": '[{"name": "zoom"}]',
        "conversations": [
            {"from": "human", "value": "Which?"},
            {"from": "gpt", "value": "See."},
            {"from": "function_call", "value": '{"name": "zoom", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "42"},
            {"from": "gpt", "value": "42"},
        ],
    }
    turns = read_conversation(record, writes_tools=True).turns
    assert [turn.role.value for turn in turns] == ["system", "human", "gpt", "human", "gpt"]
    assert turns[2].text == 'See.\n<tool_call>\n{"name": "zoom", "arguments": {"a": 1}}\n</tool_call>'
    assert turns[3].text == "<tool_response>\n42\n</tool_response>"
    assert turns[0].text.count('\n{"name": "zoom"}\n') == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": "[{"}, "has `tools` that are a text, and no JSON"),
        ({"tools": {"a": 1}}, "as `tools`; a list of objects was expected"),
        (
            {"messages": [said("user", "a"), said("assistant", "", tool_calls={"name": "x"})]},
            "a list of calls was expected",
        ),
        ({"messages": [said("user", "a"), said("assistant", "", tool_calls=[{"id": 1}])]}, "turn 1 calls a tool with"),
        ({"messages": [said("user", "a", tool_calls=[call("x")])]}, "turn 0 calls tools; only what the assistant says"),
        ({"messages": [said("user", "a"), said("tool_call", "x")]}, "turn 1 is a call of a tool, and no JSON"),
    ],
)
def test_faulty_tools_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FaultError, match=message):
        read_conversation({**TALKS["text"], **change}, writes_tools=True)
