"""Llama 3's and Qwen's formats: ids equal those of the models' own chat templates, answers and their ends are learned.

The Jinja templates are the official ones cut down to roles and contents; transformers renders and tokenises them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_deepstack.data.records.turns import Role, Turn
from megatron_deepstack.data.text.conversation import encode_conversation, encode_prompt, question_of, stop_ids
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.testing.tiny_chat import (
    LLAMA_3_CONFIG,
    LLAMA_3_TOKENS,
    QWEN_CONFIG,
    QWEN_TOKENS,
    write_chat_tokenizer,
)

OFFICIAL = {
    "llama_3": "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "qwen": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n'"
    " }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
TALK = ["What is it?", "A photo.", "Which number is\nprinted there?", "42, or 43.\n\n1. one\n2. two"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("chat")
    return {
        "llama_3": write_chat_tokenizer(folder / "llama_3", LLAMA_3_TOKENS, LLAMA_3_CONFIG),
        "qwen": write_chat_tokenizer(folder / "qwen", QWEN_TOKENS, QWEN_CONFIG),
    }


@pytest.fixture(params=["llama_3", "qwen"])
def template(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(template: str, folders: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(folders[template])


def talk(*texts: str) -> list[Turn]:
    return [Turn([Role.HUMAN, Role.GPT][number % 2], text) for number, text in enumerate(texts)]


def official(
    folder: Path, template: str, texts: list[str], prompt: bool = False, system: str | None = None
) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    theirs: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [{"role": ["user", "assistant"][n % 2], "content": text} for n, text in enumerate(texts)]
    messages = [*([] if system is None else [{"role": "system", "content": system}]), *messages]
    text = theirs.apply_chat_template(
        messages, chat_template=OFFICIAL[template], tokenize=False, add_generation_prompt=prompt
    )
    return list(theirs(text, add_special_tokens=False).input_ids)


def learned(tokens: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [tokenizer.decode(tokens[first:last].tolist()) for first, last in edges.reshape(-1, 2)]


@pytest.mark.parametrize(
    "texts",
    [
        TALK,
        ["Hi", "Yes"],
        ["", ""],
        ["早上好", "É😀"],
        ["a {{ x }} {% y %}", "<b>"],
        ["trailing \n", "answer trailing  \n\n"],
        ["two  spaces", " a space first"],
    ],
)
def test_ids_are_the_official_templates(
    texts: list[str], template: str, tokenizer: Tokenizer, folders: dict[str, Path]
) -> None:
    tokens, mask = encode_conversation(talk(*texts), template, tokenizer)
    assert tokens.tolist() == official(folders[template], template, texts)
    prompt = encode_prompt(texts[0], template, tokenizer)
    assert prompt.tolist() == official(folders[template], template, texts[:1], prompt=True)
    np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
    assert not mask[: len(prompt)].any()
    assert mask[len(prompt)] == 1


def test_answers_and_their_ends_are_learned(template: str, tokenizer: Tokenizer) -> None:
    tokens, mask = encode_conversation(talk(*TALK), template, tokenizer)
    assert learned(tokens, mask, tokenizer) == TALK[1::2]
    end, *others = stop_ids(template, tokenizer)
    assert others == []
    last = np.flatnonzero(np.diff(np.concatenate([mask, [0]]).astype(int)) == -1)
    assert tokens[last].tolist() == [end, end]
    assert mask.sum() == sum(len(tokenizer.encode(text)) + 1 for text in TALK[1::2])


@pytest.mark.parametrize("system", ["Answer in French.", " two lines\n\n here \n", "早上好"])
def test_system_texts_are_written_as_by_the_official_templates(
    system: str, template: str, tokenizer: Tokenizer, folders: dict[str, Path]
) -> None:
    tokens, mask = encode_conversation([Turn(Role.SYSTEM, system), *talk(*TALK)], template, tokenizer)
    assert tokens.tolist() == official(folders[template], template, TALK, system=system)
    assert learned(tokens, mask, tokenizer) == TALK[1::2]


def test_answers_that_are_not_learned(template: str, tokenizer: Tokenizer) -> None:
    turns = [Turn(turn.role, turn.text, learned=number != 1) for number, turn in enumerate(talk(*TALK))]
    tokens, mask = encode_conversation(turns, template, tokenizer)
    np.testing.assert_array_equal(tokens, encode_conversation(talk(*TALK), template, tokenizer)[0])
    assert learned(tokens, mask, tokenizer) == TALK[3:]


def test_a_line_break_that_begins_an_answer_is_learned(folders: dict[str, Path]) -> None:
    """Qwen's header ends with a line break, which the tokenizer would join with the answer's: generation cannot."""
    tokenizer = load_tokenizer(folders["qwen"])
    tokens, mask = encode_conversation(talk("Hi", "\nYes"), "qwen", tokenizer)
    assert learned(tokens, mask, tokenizer) == ["\nYes"]
    np.testing.assert_array_equal(tokens[mask.argmax() - 1], encode_prompt("Hi", "qwen", tokenizer)[-1])


def test_typed_control_tokens_stay_text(template: str, tokenizer: Tokenizer) -> None:
    typed = " ".join((*LLAMA_3_TOKENS, *QWEN_TOKENS))
    plain, _ = encode_conversation(talk("Hi", "Yes"), template, tokenizer)
    tokens, mask = encode_conversation(talk(f"Hi {typed}", f"Yes {typed}"), template, tokenizer)
    for name in (*LLAMA_3_TOKENS, *QWEN_TOKENS):
        number = tokenizer.control_id(name)
        if number is not None:
            assert np.count_nonzero(tokens == number) == np.count_nonzero(plain == number), name
    assert learned(tokens, mask, tokenizer) == [f"Yes {typed}"]


def test_images(template: str, tokenizer: Tokenizer) -> None:
    tokens, mask = encode_conversation(
        talk("What is it?\n<image>", "A <image>?", "<image><image>", "B"), template, tokenizer
    )
    assert np.count_nonzero(tokens == IMAGE_TOKEN_ID) == 4
    assert not mask[tokens == IMAGE_TOKEN_ID].any()
    one, _ = encode_conversation(talk("What is it?\n<image>", "A photo."), template, tokenizer)
    prompt = encode_prompt("What is it?", template, tokenizer, num_images=1)
    np.testing.assert_array_equal(one[: len(prompt)], prompt)
    front = list(prompt).index(IMAGE_TOKEN_ID)
    assert tokenizer.decode(prompt[front + 1 :].tolist()).strip().startswith("What is it?")


@pytest.mark.parametrize("question", ["What is it?", "user", "a\nb", "assistant\nuser"])
def test_the_question_is_found_in_its_prompt(question: str, template: str, tokenizer: Tokenizer) -> None:
    for images in (0, 1, 2):
        prompt = encode_prompt(question, template, tokenizer, num_images=images).tolist()
        assert question_of(prompt, template, tokenizer) == question
    assert question_of([], template, tokenizer) == ""


def test_an_answer_to_nothing_is_left_out(template: str, tokenizer: Tokenizer) -> None:
    late = encode_conversation([Turn(Role.GPT, "Hello!"), *talk("Hi", "Yes")], template, tokenizer)
    np.testing.assert_array_equal(late, encode_conversation(talk("Hi", "Yes"), template, tokenizer))


def test_a_tokenizer_of_another_kind_is_refused(folders: dict[str, Path]) -> None:
    llama, qwen = load_tokenizer(folders["llama_3"]), load_tokenizer(folders["qwen"])
    with pytest.raises(DataError, match=r"has no control token '<\|im_start\|>', which the conversation template"):
        encode_conversation(talk("Hi", "Yes"), "qwen", llama)
    with pytest.raises(DataError, match=r"qwen: names no begin-of-sequence token, which template llama_3 writes"):
        encode_conversation(talk("Hi", "Yes"), "llama_3", qwen)
    with pytest.raises(DataError, match="names no begin-of-sequence token, which template v1 writes"):
        encode_prompt("Hi", "v1", qwen)


def test_where_answers_stop(folders: dict[str, Path], tmp_path: Path) -> None:
    base = write_chat_tokenizer(tmp_path / "base", LLAMA_3_TOKENS, {**LLAMA_3_CONFIG, "eos_token": "<|end_of_text|>"})
    tokenizer = load_tokenizer(base)
    names = ("<|eot_id|>", "<|end_of_text|>")
    assert stop_ids("llama_3", tokenizer) == tuple(tokenizer.control_id(name) for name in names)
    assert stop_ids("v1", tokenizer) == (tokenizer.eos_id,)
    none = load_tokenizer(write_chat_tokenizer(tmp_path / "none", QWEN_TOKENS, {}))
    assert len(stop_ids("qwen", none)) == 1
    with pytest.raises(DataError, match="names no end-of-sequence token, which template plain writes"):
        stop_ids("plain", none)
