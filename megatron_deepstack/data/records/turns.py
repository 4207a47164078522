"""What a conversation consists of, before any template: who speaks, what is said, and where its images are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN, IMAGE_TOKEN_ID


class Role(StrEnum):
    """Who speaks, by LLaVA's names."""

    SYSTEM = "system"
    """What the assistant is told before the conversation; only the first turn of a conversation can have it."""
    HUMAN = "human"
    GPT = "gpt"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    text: str
    learned: bool = True
    """Whether an answer is learned; its record may set this to False. Other turns are never learned."""


VIDEO_TOKEN: Final = "<video>"
"""Where a video belongs in a text, in records that name videos."""
VIDEO_BEGIN, VIDEO_END = "\0<video>", "\0</video>"
"""What is put before and after the frames of a video; no record's text holds them."""


@dataclass(frozen=True, slots=True)
class Video:
    """A video as a record names it."""

    files: tuple[str, ...]
    """Path of the video file, or of an image file for each frame."""
    is_list: bool
    """Whether the files are frames."""
    fps: float | None = None
    """Frames per second of a list of frames, if the record says it."""


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Tokens that are all learned, or all not learned."""

    tokens: list[int]
    learned: bool


def is_whole_text(text: str) -> bool:
    """Whether a text holds characters alone.

    A JSON escape, or bytes that are no UTF-8, may leave half of a surrogate pair, which neither a tokenizer nor a file
    takes.
    """
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def image_first(text: str) -> str:
    """A turn's text with its image in front, as in the published data; several images stay where they are."""
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a text with placeholders.

    The pieces of text between the placeholders are encoded separately, as in the published code.

    Args:
        text: A text with any number of `<image>`.
        tokenizer: Encodes the pieces.

    Returns:
        Token ids, with IMAGE_TOKEN_ID for each placeholder; no begin or end of sequence.
    """
    first, *rest = text.split(IMAGE_TOKEN)
    tokens = tokenizer.encode(first)
    for piece in rest:
        tokens += [IMAGE_TOKEN_ID, *tokenizer.encode(piece)]
    return tokens


def system_of(turns: Sequence[Turn]) -> str | None:
    """The system text of a conversation; None if it has none, so that the template writes its own."""
    return turns[0].text if turns and turns[0].role is Role.SYSTEM else None


def talk_of(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns after the system text."""
    return turns[1:] if system_of(turns) is not None else turns


def rounds_of(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns from the first question on; an answer without a question is left out, as in the published code."""
    talk = talk_of(turns)
    return talk[1:] if talk and talk[0].role is Role.GPT else talk
