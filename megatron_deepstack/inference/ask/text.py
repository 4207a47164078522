"""From token ids to text while an answer is written: what can be shown already, and where stop words end it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_deepstack.data.text.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"
"""What decoding gives for bytes that are not yet a whole character."""
_SPARE = 8
"""Tokens beyond a stop word's characters that are decoded to find it: each byte of a character may be a token."""


@dataclass(frozen=True, slots=True)
class StopWords:
    """Texts that end an answer. It pickles, since ranks use it."""

    words: tuple[str, ...]
    tokenizer: Tokenizer

    def __call__(self, ids: Sequence[int]) -> bool:
        """Whether the newest tokens of an answer complete a stop word."""
        if not self.words:
            return False
        last = ids[-(4 * max(map(len, self.words)) + _SPARE) :]
        text = self.tokenizer.decode(last)
        return any(word in text for word in self.words)

    def before(self, text: str) -> str:
        """The text before the first stop word."""
        ends = [text.find(word) for word in self.words]
        return text[: min((end for end in ends if end >= 0), default=len(text))]


class TextStream:
    """An answer's text in the pieces in which it can be shown: nothing that is shown has to be taken back."""

    def __init__(self, stop_words: StopWords) -> None:
        self._stop_words = stop_words
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token: int) -> str:
        """Take one token, and return what can be shown now and could not before."""
        self._ids.append(token)
        text = self._text()
        hidden = max(
            (n for word in self._stop_words.words for n in range(1, len(word)) if text.endswith(word[:n])), default=0
        )
        return self._show(text[: len(text) - hidden].rstrip(_UNFINISHED).rstrip())

    def rest(self) -> str:
        """What is left at the end of the answer."""
        return self._show(self._text().strip())

    def _text(self) -> str:
        decoded = self._stop_words.tokenizer.decode(self._ids)
        return self._stop_words.before(decoded).lstrip()

    def _show(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        new = text[len(self._shown) :]
        self._shown = text
        return new
