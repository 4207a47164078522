"""Conversations to token ids and loss masks, equal to the published LLaVA preprocessing where that is well-defined.

A template writes a conversation as one text; the text is cut at each `<image>`, the pieces are encoded separately, and
IMAGE_TOKEN_ID stands between them. What the assistant says is learned, its end of sequence included; everything else
is not. Where the published code gives up silently (a sample whose token count it cannot reproduce is masked as a
whole), the mask here is simply right; where it loses images (several in one turn), they all stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from megatron_deepstack.data.tokenizer import Tokenizer
from megatron_deepstack.errors import ConfigError, DataError
from megatron_deepstack.planning.tokens import IMAGE_TOKEN, IMAGE_TOKEN_ID


class Role(StrEnum):
    """Who speaks, by LLaVA's names."""

    HUMAN = "human"
    GPT = "gpt"


class Template(StrEnum):
    """How a conversation is written as text."""

    PLAIN = "plain"
    V1 = "v1"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    text: str


_V1_SYSTEM: Final = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_V1_QUESTION: Final = "USER: "
_V1_ANSWER: Final = " ASSISTANT:"


def known_template(name: Template | str) -> Template:
    """The template of that name; raises ConfigError for an unknown one."""
    try:
        return Template(name)
    except ValueError:
        known = ", ".join(Template)
        raise ConfigError([f"data.template is {str(name)!r}; known templates: {known}"]) from None


def encode_conversation(
    turns: Sequence[Turn], template: Template | str, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (int32, T) with one IMAGE_TOKEN_ID per `<image>`, and loss mask (uint8, T; 1 where the token is learned).

    Raises DataError for turns that the template cannot write, ConfigError for an unknown template.
    """
    known = known_template(template)
    check_turns(turns, known)
    spans = _WRITERS[known](turns, tokenizer)
    tokens = np.fromiter((token for span in spans for token in span.tokens), dtype=np.int32)
    mask = np.concatenate([np.full(len(span.tokens), span.learned, dtype=np.uint8) for span in spans])
    mask[tokens == IMAGE_TOKEN_ID] = 0
    return tokens, mask


def encode_prompt(
    question: str, template: Template | str, tokenizer: Tokenizer, *, num_images: int | None = None
) -> np.ndarray:
    """Tokens (int32, T) after which the model writes its answer.

    `num_images` placeholders are put in front of a question that holds none; a question that holds placeholders must
    hold that many (any number if None). Raises DataError otherwise.
    """
    count = question.count(IMAGE_TOKEN)
    if num_images is not None and count == 0:
        question, count = f"{IMAGE_TOKEN}\n" * num_images + question, num_images
    if num_images is not None and count != num_images:
        raise DataError(f"the question {question!r} holds {count} {IMAGE_TOKEN}, but there are {num_images} images")
    if known_template(template) is Template.PLAIN:
        tokens = [tokenizer.bos_id, *[IMAGE_TOKEN_ID] * count]
    else:
        text = f"{_V1_SYSTEM} {_V1_QUESTION}{image_first(question)}{_V1_ANSWER}"
        tokens = [tokenizer.bos_id, *encode_text(text, tokenizer)]
    return np.array(tokens, dtype=np.int32)


def question_of(prompt: str) -> str:
    """The question in a decoded prompt: what the last human turn says; empty for a caption, which none is asked for."""
    _, _, turn = prompt.rpartition(_V1_QUESTION.strip())
    return turn.rpartition(_V1_ANSWER.strip())[0].strip() if _V1_ANSWER.strip() in turn else ""


def image_first(text: str) -> str:
    """A turn's text with its image in front, as the published data has it; several images stay where they are."""
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a text with placeholders: the pieces between them encoded separately, as published."""
    first, *rest = text.split(IMAGE_TOKEN)
    tokens = tokenizer.encode(first)
    for piece in rest:
        tokens += [IMAGE_TOKEN_ID, *tokenizer.encode(piece)]
    return tokens


def check_turns(turns: Sequence[Turn], template: Template) -> None:
    """Raise DataError, saying what was found, if `template` cannot write these turns."""
    roles = [turn.role for turn in turns]
    found = ", ".join(roles[:6]) + (f", ... ({len(roles)} turns)" if len(roles) > 6 else "")
    if template is Template.PLAIN:
        if roles != [Role.HUMAN, Role.GPT] or IMAGE_TOKEN not in turns[0].text:
            raise DataError(f"template plain takes a human turn with an {IMAGE_TOKEN} and a gpt turn; found {found}")
        return
    rounds = _rounds(turns)
    if not rounds or [turn.role for turn in rounds] != [Role.HUMAN, Role.GPT] * (len(rounds) // 2):
        raise DataError(f"turns must alternate, human then gpt, and end with gpt; found {found}")
    if len(rounds) < len(turns) and IMAGE_TOKEN in turns[0].text:
        raise DataError(f"begins with a gpt turn that holds an {IMAGE_TOKEN}; a turn that answers nothing is not used")


@dataclass(frozen=True, slots=True)
class _Span:
    """Tokens that are all learned or all not."""

    tokens: list[int]
    learned: bool


def _rounds(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns from the first question on; an answer to nothing is left out, as published."""
    return turns[1:] if turns and turns[0].role is Role.GPT else turns


def _write_plain(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[_Span]:
    """The first turn gives only its images; the second, a caption, follows with a newline and is learned."""
    images = [IMAGE_TOKEN_ID] * turns[0].text.count(IMAGE_TOKEN)
    return [_Span([tokenizer.bos_id, *images], False), _Span(encode_text(turns[1].text + "\n", tokenizer), True)]


def _write_v1(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[_Span]:
    """Vicuna's: a system line, then rounds of `USER: ... ASSISTANT: ...`, an end of sequence after each answer."""
    rounds = _rounds(turns)
    spans = [_Span([tokenizer.bos_id], False)]
    for number in range(0, len(rounds), 2):
        system = f"{_V1_SYSTEM} " if number == 0 else ""
        question = f"{system}{_V1_QUESTION}{image_first(rounds[number].text)}{_V1_ANSWER}"
        spans += _question_and_answer(question, image_first(rounds[number + 1].text), tokenizer)
    return spans


def _question_and_answer(question: str, answer: str, tokenizer: Tokenizer) -> list[_Span]:
    """Question and answer are encoded as one text; the answer's tokens are those that follow the question's."""
    prefix = encode_text(question, tokenizer)
    tokens = encode_text(f"{question} {answer}", tokenizer)
    if tokens[: len(prefix)] != prefix:
        raise DataError(
            f"{tokenizer.source}: the tokenizer makes tokens that reach from {question[-20:]!r} into the answer "
            f"{answer[:20]!r}, so that they can be neither learned nor left out. Use one that splits at spaces."
        )
    return [_Span(prefix, False), _Span([*tokens[len(prefix) :], tokenizer.eos_id], True)]


_WRITERS: Final[dict[Template, Callable[[Sequence[Turn], Tokenizer], list[_Span]]]] = {
    Template.PLAIN: _write_plain,
    Template.V1: _write_v1,
}
