"""Templates, placeholders and loss masks."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from megatron_deepstack.data.records.turns import Role, Turn, image_first
from megatron_deepstack.data.text.conversation import encode_conversation, encode_prompt
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import ConfigError, DataError
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID


def talk(*texts: str, first: Role = Role.HUMAN) -> list[Turn]:
    roles = [Role.HUMAN, Role.GPT] if first is Role.HUMAN else [Role.GPT, Role.HUMAN]
    return [Turn(roles[number % 2], text) for number, text in enumerate(texts)]


def learned(tokens: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The texts of the runs of learned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [tokenizer.decode(tokens[first:last].tolist()) for first, last in edges.reshape(-1, 2)]


def test_only_answers_are_learned_each_with_its_end(tokenizer: Tokenizer) -> None:
    turns = talk("<image>\nWhat is it?", "A photo.", "Which number?", "42")
    tokens, mask = encode_conversation(turns, "v1", tokenizer)
    assert (tokens.dtype, mask.dtype) == (np.int32, np.uint8)
    assert tokens[0] == tokenizer.bos_id
    assert learned(tokens, mask, tokenizer) == ["A photo.", "42"]
    assert np.count_nonzero(tokens == tokenizer.eos_id) == 2
    assert mask[tokens == tokenizer.eos_id].all()


@pytest.mark.parametrize("answer", ["", " ", "  two", "7", "\n", "早上好", "a </s> b", "USER: me ASSISTANT: you"])
def test_odd_answers_are_learned_exactly(answer: str, tokenizer: Tokenizer) -> None:
    tokens, mask = encode_conversation(talk("What is it?", answer), "v1", tokenizer)
    prompt = encode_prompt("What is it?", "v1", tokenizer)
    np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
    assert not mask[: len(prompt)].any()
    assert mask[len(prompt) :].all()
    assert np.count_nonzero(tokens == tokenizer.eos_id) == 1, "text became a control token"


def test_prompt_is_what_training_saw_before_the_answer(tokenizer: Tokenizer) -> None:
    tokens, mask = encode_conversation(talk("What is it?\n<image>", "A photo."), "v1", tokenizer)
    prompt = encode_prompt("What is it?", "v1", tokenizer, num_images=1)
    np.testing.assert_array_equal(tokens[mask == 0], prompt)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("What?\n<image>", "<image>\nWhat?"),
        ("<image>", "<image>"),
        (" no image ", " no image "),
        ("<image> against <image>", "<image> against <image>"),
    ],
)
def test_one_image_moves_to_the_front_several_stay(text: str, written: str) -> None:
    assert image_first(text) == written


def test_several_images_and_images_in_later_turns_keep_their_placeholders(tokenizer: Tokenizer) -> None:
    turns = talk("<image> or <image>?", "The first.", "And <image> here?", "No.")
    tokens, mask = encode_conversation(turns, "v1", tokenizer)
    assert np.count_nonzero(tokens == IMAGE_TOKEN_ID) == 3
    assert not mask[tokens == IMAGE_TOKEN_ID].any()


def test_plain_learns_the_caption_and_its_newline(tokenizer: Tokenizer) -> None:
    tokens, mask = encode_conversation(talk("<image>\nDescribe it.", "A photo."), "plain", tokenizer)
    assert tokens[:2].tolist() == [tokenizer.bos_id, IMAGE_TOKEN_ID]
    assert mask.tolist() == [0, 0] + [1] * (len(tokens) - 2)
    assert tokens[2:].tolist() == tokenizer.encode("A photo.\n")
    np.testing.assert_array_equal(encode_prompt("", "plain", tokenizer, num_images=1), tokens[:2])


def test_a_system_text_takes_the_place_of_v1s_own_line(tokenizer: Tokenizer) -> None:
    turns = [Turn(Role.SYSTEM, "Answer in French."), *talk("Hi", "Yes", "And?", "No")]
    tokens, mask = encode_conversation(turns, "v1", tokenizer)
    question, later = "Answer in French. USER: Hi ASSISTANT:", "USER: And? ASSISTANT:"
    expected = [tokenizer.bos_id, *tokenizer.encode(f"{question} Yes"), tokenizer.eos_id]
    assert tokens.tolist() == [*expected, *tokenizer.encode(f"{later} No"), tokenizer.eos_id]
    assert learned(tokens, mask, tokenizer) == ["Yes", "No"]


def test_answers_can_be_left_out_of_what_is_learned(tokenizer: Tokenizer) -> None:
    first, answer, *rest = talk("Hi", "Yes", "And?", "No")
    turns = [first, Turn(Role.GPT, answer.text, learned=False), *rest]
    tokens, mask = encode_conversation(turns, "v1", tokenizer)
    whole, _ = encode_conversation([first, answer, *rest], "v1", tokenizer)
    np.testing.assert_array_equal(tokens, whole)
    assert learned(tokens, mask, tokenizer) == ["No"]
    caption = [Turn(Role.HUMAN, "<image>"), Turn(Role.GPT, "A photo.", learned=False)]
    assert not encode_conversation(caption, "plain", tokenizer)[1].any()


def test_an_answer_to_nothing_is_left_out(tokenizer: Tokenizer) -> None:
    late = encode_conversation(talk("Hello!", "What is it?", "A photo.", first=Role.GPT), "v1", tokenizer)
    plain = encode_conversation(talk("What is it?", "A photo."), "v1", tokenizer)
    np.testing.assert_array_equal(late, plain)


@pytest.mark.parametrize(
    ("turns", "template", "message"),
    [
        ([], "v1", "turns must alternate, human then gpt, and end with gpt; found $"),
        (talk("What?"), "v1", "found human$"),
        ([*talk("a", "b"), *talk("c", "d", first=Role.GPT)], "v1", "found human, gpt, gpt, human$"),
        (talk("<image>", "What?", "A.", first=Role.GPT), "v1", "begins with a gpt turn that holds an <image>"),
        ([Turn(Role.SYSTEM, "x"), *talk("<image>", "A.")], "plain", "has a system text, which template plain has no"),
        ([Turn(Role.SYSTEM, "<image>"), *talk("a", "b")], "v1", "its system text holds an <image>"),
        ([*talk("a", "b"), Turn(Role.SYSTEM, "x")], "v1", "found human, gpt, system$"),
        (
            talk("What?", "A."),
            "plain",
            "template plain takes a human turn with an <image> and a gpt turn; found human, gpt",
        ),
    ],
)
def test_turns_a_template_cannot_write(turns: list[Turn], template: str, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=message):
        encode_conversation(turns, template, tokenizer)


def test_unknown_template_and_wrong_number_of_images(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"data.template is 'v2'; known templates: plain, v1"):
        encode_prompt("What?", "v2", tokenizer)
    with pytest.raises(DataError, match="holds 2 <image>, but there are 1 images"):
        encode_prompt("<image><image>", "v1", tokenizer, num_images=1)


def test_tokenizer_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"absent.model: the tokenizer cannot be read"):
        load_tokenizer(tmp_path / "absent.model")
    for content in (b"", b"not a model"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match=r"bad.model: (not a SentencePiece model|the model has 0 ids)"):
            load_tokenizer(tmp_path / "bad.model")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode("A photo") == tokenizer.encode("A photo")
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("A photo"), IMAGE_TOKEN_ID, 10**6]) == "A photo"


def test_a_question_of_no_characters_is_refused(tokenizer: Tokenizer) -> None:
    """As bytes on the command line become that are no UTF-8."""
    with pytest.raises(DataError, match=r"'hi \\udcff' holds half of a surrogate pair or bytes that are no UTF-8"):
        encode_prompt("hi \udcff", "v1", tokenizer)
