"""Chat formats that separate turns by control tokens: those of Llama 3 and Granite 4, and ChatML as Qwen uses it.

Token ids equal those of the models' own chat templates. Control tokens are written by their ids, and text never becomes
one. An answer is encoded separately, after the header of its turn, since that is how the model writes it. What is
learned is the answer and the token that ends the turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from megatron_deepstack.data.records.turns import VIDEO_BEGIN, VIDEO_END, Role, TokenRun, Turn, image_first
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN, IMAGE_TOKEN_ID

_MARKS: Final = re.compile(f"({'|'.join(map(re.escape, (VIDEO_BEGIN, VIDEO_END, IMAGE_TOKEN)))})")
_NAMES: Final = {Role.HUMAN: "user", Role.GPT: "assistant"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """How a chat is written: `begin name after_name gap text end after_end` for each turn."""

    begin: str
    """Control token before the speaker's name."""
    after_name: str = ""
    """Control token after it, if any."""
    gap: str
    """Text between name and message."""
    end: str
    """Control token after the message."""
    after_end: str = ""
    """Text after that."""
    system: str = ""
    """What the system says first, if anything."""
    clean: Callable[[str], str] = str
    """What is done to a message."""
    arrange: Callable[[str], str] = image_first
    """Where the images of a message belong in it."""
    around_image: tuple[str, ...] = ()
    """Control tokens before and after an image, if any."""
    after_image: str = "\n"
    """Text after an image that is put in front of a question."""
    has_begin: bool = False
    """Whether the token that begins a sequence comes first."""
    writes_tools: bool = False
    """Whether tools, calls of them and their responses are written as in `data.records.tools`."""

    def write(self, rounds: Sequence[Turn], tokenizer: Tokenizer, *, system: str | None = None) -> list[TokenRun]:
        """Write questions and answers in turn, without a begin of the sequence.

        Args:
            rounds: Turns, alternating question and answer.
            tokenizer: Must have the format's control tokens.
            system: Replaces the format's own system text; None keeps that.

        Returns:
            Spans of tokens, in order.

        Raises:
            DataError: The tokenizer lacks a control token.
        """
        spans = [TokenRun(self._system(tokenizer, system), False)]
        for turn in rounds:
            if turn.role is Role.HUMAN:
                spans.append(TokenRun(self._said(_NAMES[turn.role], turn.text, tokenizer), False))
                continue
            spans.append(TokenRun(self._opening(_NAMES[turn.role], "", tokenizer), False))
            answer = self._encode(self._message(turn.text), tokenizer)
            spans.append(TokenRun([*answer, _control(self.end, tokenizer)], turn.learned))
            spans.append(TokenRun(tokenizer.encode(self.after_end), False))
        return spans

    def prompt(self, question: str, tokenizer: Tokenizer) -> list[int]:
        """A conversation's first question, after the format's own system text, and the header of the answer.

        Args:
            question: The question, with an `<image>` for each image.
            tokenizer: Must have the format's control tokens.

        Returns:
            Token ids, without a begin of the sequence.

        Raises:
            DataError: The tokenizer lacks a control token.
        """
        return [*self._system(tokenizer), *self.question(question, tokenizer)]

    def question(self, question: str, tokenizer: Tokenizer) -> list[int]:
        """The same as `prompt` without the system text, for a question that follows an answer.

        Args:
            question: The question, with an `<image>` for each image.
            tokenizer: Must have the format's control tokens.

        Returns:
            Token ids.

        Raises:
            DataError: The tokenizer lacks a control token.
        """
        said = self._said(_NAMES[Role.HUMAN], question, tokenizer)
        return [*said, *self._opening(_NAMES[Role.GPT], "", tokenizer)]

    def question_in(self, tokens: Sequence[int], tokenizer: Tokenizer) -> str:
        """Find the question in a prompt.

        Args:
            tokens: The prompt's token ids; negative ones, which stand for images, are left out.
            tokenizer: The tokenizer that made them.

        Returns:
            The text of the last whole turn, without its speaker's name; empty if there is none.

        Raises:
            DataError: The tokenizer lacks a control token.
        """
        begin, end = _control(self.begin, tokenizer), _control(self.end, tokenizer)
        ends = [position for position, token in enumerate(tokens) if token == end]
        begins = [position for position, token in enumerate(tokens[: ends[-1] if ends else 0]) if token == begin]
        if not begins:
            return ""
        text = tokenizer.decode([token for token in tokens[begins[-1] : ends[-1]] if token >= 0]).strip()
        return text.removeprefix(_NAMES[Role.HUMAN]).strip()

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The id of the token that ends a turn."""
        return _control(self.end, tokenizer)

    def _system(self, tokenizer: Tokenizer, given: str | None = None) -> list[int]:
        text = self.system if given is None else given
        return self._said("system", text, tokenizer) if text else []

    def _said(self, name: str, text: str, tokenizer: Tokenizer) -> list[int]:
        opening = self._opening(name, self._message(text), tokenizer)
        return [*opening, _control(self.end, tokenizer), *tokenizer.encode(self.after_end)]

    def _message(self, text: str) -> str:
        return self.clean(self.arrange(text))

    def _opening(self, name: str, text: str, tokenizer: Tokenizer) -> list[int]:
        """The header of a turn and what follows it; text between two control tokens is encoded in one piece."""
        begin = _control(self.begin, tokenizer)
        if not self.after_name:
            return [begin, *self._encode(f"{name}{self.gap}{text}", tokenizer)]
        after = _control(self.after_name, tokenizer)
        return [begin, *tokenizer.encode(name), after, *self._encode(self.gap + text, tokenizer)]

    def _encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """The ids of a text with placeholders. The pieces between the placeholders are encoded separately."""
        around = [_control(name, tokenizer) for name in self.around_image]
        image = [*around[:1], IMAGE_TOKEN_ID, *around[1:]]
        marks = {IMAGE_TOKEN: image, VIDEO_BEGIN: around[:1], VIDEO_END: around[1:]}
        tokens: list[int] = []
        for piece in _MARKS.split(text):
            tokens += marks[piece] if piece in marks else tokenizer.encode(piece)
        return tokens


LLAMA_3: Final = ChatFormat(
    begin="<|start_header_id|>",
    after_name="<|end_header_id|>",
    gap="\n\n",
    end="<|eot_id|>",
    clean=str.strip,
    has_begin=True,
)
"""The format of Llama 3; it begins with the begin-of-sequence token, and has no system line of its own."""
QWEN: Final = ChatFormat(
    begin="<|im_start|>", gap="\n", end="<|im_end|>", after_end="\n", system="You are a helpful assistant."
)
"""ChatML with the system line of Qwen2 and Qwen2-VL (that of Qwen2.5 is longer, and Qwen3 has none)."""
QWEN3_VL: Final = ChatFormat(
    begin="<|im_start|>",
    gap="\n",
    end="<|im_end|>",
    after_end="\n",
    arrange=str,
    around_image=("<|vision_start|>", "<|vision_end|>"),
    after_image="",
    writes_tools=True,
)
"""ChatML as Qwen3-VL uses it: no system line of its own, images where they stand between two control tokens. What an
answer thinks (`<think>`) is part of the answer."""

GRANITE_4: Final = ChatFormat(
    begin="<|start_of_role|>",
    after_name="<|end_of_role|>",
    gap="",
    end="<|end_of_text|>",
    after_end="\n",
    arrange=str,
)
"""The format of Granite 4 without a system line of its own, with images where they stand."""


def _control(name: str, tokenizer: Tokenizer) -> int:
    number = tokenizer.control_id(name)
    if number is None:
        raise DataError(
            f"{tokenizer.source}: has no control token {name!r}, which the conversation template writes. Give the "
            "tokenizer that belongs to the template (data.tokenizer), or another template (data.template)."
        )
    return number
