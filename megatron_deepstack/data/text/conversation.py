"""Conversations to token ids and loss masks, equal to the published LLaVA preprocessing where that is well-defined.

A template writes a conversation as one text; the text is cut at each `<image>`, the pieces are encoded separately, and
IMAGE_TOKEN_ID is put between them. What the assistant says is learned, including its end of sequence or of turn;
everything else is not. In two cases the published code silently loses something. It masks a whole sample whose token
count it cannot reproduce; here the mask is correct. It loses images if there are several in one turn; here they all
stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from megatron_deepstack.config.choices import Template
from megatron_deepstack.data.records.turns import (
    Role,
    TokenRun,
    Turn,
    encode_text,
    image_first,
    is_whole_text,
    rounds_of,
    system_of,
    talk_of,
)
from megatron_deepstack.data.text.chat import GRANITE_4, LLAMA_3, QWEN, QWEN3_VL, ChatFormat
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.errors import ConfigError, DataError
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN, IMAGE_TOKEN_ID

V1_SYSTEM: Final = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
V1_QUESTION: Final = "USER: "
V1_ANSWER: Final = " ASSISTANT:"
CHATS: Final[dict[Template, ChatFormat]] = {
    Template.LLAMA_3: LLAMA_3,
    Template.QWEN: QWEN,
    Template.QWEN3_VL: QWEN3_VL,
    Template.GRANITE_4: GRANITE_4,
}


def known_template(name: Template | str) -> Template:
    """The template of that name, as a store records it. Raises ConfigError for an unknown one."""
    try:
        return Template(name)
    except ValueError:
        known = ", ".join(Template)
        raise ConfigError([f"data.template is {str(name)!r}; known templates: {known}"]) from None


def writes_tools(template: Template) -> bool:
    """Whether a template writes tools, calls of them and their responses."""
    return template in CHATS and CHATS[template].writes_tools


def encode_conversation(
    turns: Sequence[Turn], template: Template | str, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Encode a conversation as tokens.

    A first turn of role `system` replaces the template's own system text: v1's line before the first question, or the
    system turn of ChatML. Llama 3's format has no text of its own and gets a system turn.

    Args:
        turns: The conversation; an answer whose `learned` is False is written, but not learned.
        template: How it is written.
        tokenizer: Makes tokens of the text.

    Returns:
        Tokens (int32, T) with one IMAGE_TOKEN_ID per `<image>`, and loss mask (uint8, T; 1 where the token is learned).

    Raises:
        DataError: The template cannot write these turns, or the tokenizer lacks a token that it writes.
        ConfigError: The template is unknown.
    """
    known = known_template(template)
    check_turns(turns, known)
    spans = _write(turns, known, tokenizer)
    tokens = np.fromiter((token for span in spans for token in span.tokens), dtype=np.int32)
    mask = np.concatenate([np.full(len(span.tokens), span.learned, dtype=np.uint8) for span in spans])
    mask[tokens == IMAGE_TOKEN_ID] = 0
    return tokens, mask


def encode_prompt(
    question: str,
    template: Template | str,
    tokenizer: Tokenizer,
    *,
    num_images: int | None = None,
    history: Sequence[Turn] = (),
) -> np.ndarray:
    """Encode the tokens after which the model writes its answer.

    Args:
        question: The question. If it holds no `<image>`, `num_images` of them are put in front.
        template: How it is written.
        tokenizer: Makes tokens of the text.
        num_images: How many `<image>` the question must hold; None allows any number.
        history: What was said before: questions and answers in turn, encoded as in training.

    Returns:
        int32 (T,), with one IMAGE_TOKEN_ID per `<image>`.

    Raises:
        DataError: The question holds another number of `<image>` or what is no text, the tokenizer lacks a token, or
            the template has no place for what was said before.
        ConfigError: The template is unknown.
    """
    if not is_whole_text(question):
        raise DataError(
            f"the question {question!r} holds half of a surrogate pair or bytes that are no UTF-8, which are no "
            "characters; correct the text"
        )
    known, count = known_template(template), question.count(IMAGE_TOKEN)
    if num_images is not None and count == 0:
        gap = CHATS[known].after_image if known in CHATS else "\n"
        question, count = f"{IMAGE_TOKEN}{gap}" * num_images + question, num_images
    if num_images is not None and count != num_images:
        raise DataError(
            f"the question {question!r} holds {count} {IMAGE_TOKEN}, but there are {num_images} images; write it once "
            "for each picture, or not at all, which puts them first"
        )
    if history:
        before, _ = encode_conversation(history, known, tokenizer)
        return np.concatenate([before, np.array(_next_question(question, known, tokenizer), dtype=np.int32)])
    if known is Template.PLAIN:
        tokens = [*_begin(known, tokenizer), *[IMAGE_TOKEN_ID] * count]
    elif known is Template.V1:
        text = f"{V1_SYSTEM} {V1_QUESTION}{image_first(question)}{V1_ANSWER}"
        tokens = [*_begin(known, tokenizer), *encode_text(text, tokenizer)]
    else:
        tokens = [*_begin(known, tokenizer), *CHATS[known].prompt(question, tokenizer)]
    return np.array(tokens, dtype=np.int32)


def _next_question(question: str, template: Template, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a question that follows an answer."""
    if template is Template.PLAIN:
        raise DataError("template plain writes captions only, so a question cannot follow an answer")
    if template is Template.V1:
        return encode_text(f"{V1_QUESTION}{image_first(question)}{V1_ANSWER}", tokenizer)
    return CHATS[template].question(question, tokenizer)


def question_of(prompt: Sequence[int], template: Template | str, tokenizer: Tokenizer) -> str:
    """Find the question in a prompt, for people to read.

    Args:
        prompt: Token ids, as `encode_prompt` makes them; negative ones, which stand for images, are left out.
        template: How the prompt is written.
        tokenizer: The tokenizer that made it.

    Returns:
        The text of the last human turn; empty for a caption, which has no question.

    Raises:
        DataError: The tokenizer lacks a control token of the template.
        ConfigError: The template is unknown.
    """
    known = known_template(template)
    if known in CHATS:
        return CHATS[known].question_in(prompt, tokenizer)
    _, _, turn = tokenizer.decode(prompt).rpartition(V1_QUESTION.strip())
    return turn.rpartition(V1_ANSWER.strip())[0].strip() if V1_ANSWER.strip() in turn else ""


def stop_ids(template: Template | str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer.

    Args:
        template: How the conversation is written.
        tokenizer: The tokenizer.

    Returns:
        The id that the template has the model learn at an answer's end, and the tokenizer's end of sequence, if that is
        another one.

    Raises:
        DataError: The tokenizer lacks the template's end token.
        ConfigError: The template is unknown.
    """
    known = known_template(template)
    ends = [CHATS[known].end_id(tokenizer)] if known in CHATS else [_end(known, tokenizer)]
    return tuple(dict.fromkeys([*ends, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]))


def check_turns(turns: Sequence[Turn], template: Template) -> None:
    """Check that a template can write a conversation.

    Args:
        turns: The conversation.
        template: How it would be written.

    Raises:
        DataError: It cannot; the message says what was found. It does not name the record, which the caller does.
    """
    system, turns = system_of(turns), talk_of(turns)
    roles = [turn.role for turn in turns]
    if system is not None and template is Template.PLAIN:
        raise DataError("has a system text, which template plain has no place for (data.template)")
    if system is not None and IMAGE_TOKEN in system:
        raise DataError(f"its system text holds an {IMAGE_TOKEN}; images belong to what the human says")
    found = ", ".join(roles[:6]) + (f", ... ({len(roles)} turns)" if len(roles) > 6 else "")
    if template is Template.PLAIN:
        if roles != [Role.HUMAN, Role.GPT] or IMAGE_TOKEN not in turns[0].text:
            raise DataError(f"template plain takes a human turn with an {IMAGE_TOKEN} and a gpt turn; found {found}")
        return
    rounds = rounds_of(turns)
    if not rounds or [turn.role for turn in rounds] != [Role.HUMAN, Role.GPT] * (len(rounds) // 2):
        raise DataError(f"turns must alternate, human then gpt, and end with gpt; found {found}")
    if len(rounds) < len(turns) and IMAGE_TOKEN in turns[0].text:
        raise DataError(f"begins with a gpt turn that holds an {IMAGE_TOKEN}; a turn that answers nothing is not used")


def _write(turns: Sequence[Turn], template: Template, tokenizer: Tokenizer) -> list[TokenRun]:
    begin = [TokenRun(_begin(template, tokenizer), False)]
    if template is Template.PLAIN:
        return begin + _write_plain(turns, tokenizer)
    if template is Template.V1:
        return begin + _write_v1(rounds_of(turns), system_of(turns) or V1_SYSTEM, tokenizer)
    return begin + CHATS[template].write(rounds_of(turns), tokenizer, system=system_of(turns))


def _begin(template: Template, tokenizer: Tokenizer) -> list[int]:
    """The begin of the sequence; not every chat format has one."""
    if template in CHATS and not CHATS[template].has_begin:
        return []
    return [_must_have(tokenizer.bos_id, "begin", template, tokenizer)]


def _end(template: Template, tokenizer: Tokenizer) -> int:
    return _must_have(tokenizer.eos_id, "end", template, tokenizer)


def _must_have(number: int | None, which: str, template: Template, tokenizer: Tokenizer) -> int:
    if number is None:
        raise DataError(
            f"{tokenizer.source}: names no {which}-of-sequence token, which template {template} writes; name it in "
            "tokenizer_config.json, or choose the template that belongs to the tokenizer (data.template)"
        )
    return number


def _write_plain(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[TokenRun]:
    """The first turn gives only its images; the second, a caption, follows with a newline and is learned."""
    images = [IMAGE_TOKEN_ID] * turns[0].text.count(IMAGE_TOKEN)
    return [TokenRun(images, False), TokenRun(encode_text(turns[1].text + "\n", tokenizer), turns[1].learned)]


def _write_v1(rounds: Sequence[Turn], system: str, tokenizer: Tokenizer) -> list[TokenRun]:
    """Vicuna's format: a system line, then rounds of `USER: ... ASSISTANT: ...` with an end of sequence."""
    spans: list[TokenRun] = []
    for number in range(0, len(rounds), 2):
        before, answer = (f"{system} " if number == 0 else ""), rounds[number + 1]
        question = f"{before}{V1_QUESTION}{image_first(rounds[number].text)}{V1_ANSWER}"
        asked, said = _question_and_answer(question, image_first(answer.text), tokenizer)
        spans += [TokenRun(asked, False), TokenRun(said, answer.learned)]
    return spans


def _question_and_answer(question: str, answer: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Question and answer are encoded as one text; the answer's tokens are those that follow the question's."""
    prefix = encode_text(question, tokenizer)
    tokens = encode_text(f"{question} {answer}", tokenizer)
    if tokens[: len(prefix)] != prefix:
        raise DataError(
            f"{tokenizer.source}: the tokenizer makes tokens that reach from {question[-20:]!r} into the answer "
            f"{answer[:20]!r}, so that they can be neither learned nor left out. Use one that splits at spaces."
        )
    return prefix, [*tokens[len(prefix) :], _end(Template.V1, tokenizer)]
