"""Text to token ids: what every tokenizer offers, and the SentencePiece kind that LLaMA and Vicuna use.

SentencePiece's own encoding is used (the "slow, legacy" behaviour of Hugging Face's LlamaTokenizer, with which the
published data was made): every separately encoded piece of text gets the model's dummy prefix. Text never becomes a
control token: `</s>` typed by a user is encoded as those four characters, not as the end of the sequence.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import sentencepiece

from megatron_deepstack.data.file_kind import START_BYTES, is_tiktoken, what_file_is
from megatron_deepstack.errors import DataError

SENTENCEPIECE_FILE: Final = "tokenizer.model"
"""Name under which Hugging Face keeps a SentencePiece model."""
GIVE_A_TOKENIZER: Final = (
    "Give a SentencePiece .model file, or a Hugging Face tokenizer.json or its folder (data.tokenizer=...)."
)
TIKTOKEN_ADVICE: Final = (
    "Such a file says nothing of special tokens and of how text is split: give the tokenizer.json of the same release "
    "in Hugging Face's form (of Llama 3, it lies one folder above `original`), or its folder (data.tokenizer=...)."
)


class Tokenizer(ABC):
    """Text to token ids and back. It pickles as its files' bytes, so that a worker on another machine needs no file."""

    source: str
    """Where it was read from, for messages."""
    fingerprint: str
    """sha256 of what decides its ids."""
    vocab_size: int
    """The largest id plus one."""
    num_text_ids: int
    """The largest id that text can give, plus one: control tokens may have larger ones."""
    bos_id: int | None
    """Begin of sequence, if it has one."""
    eos_id: int | None
    """End of sequence, if it has one."""
    pad_id: int
    files: Mapping[str, bytes]
    """Its files by name, as Hugging Face expects them beside a model."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without begin or end of sequence. It never gives the id of a control token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without control tokens and ids that are no words (placeholders, padding rows)."""

    @abstractmethod
    def control_id(self, name: str) -> int | None:
        """The id of the control token of that name; None if there is none."""

    @abstractmethod
    def name_of(self, number: int) -> str | None:
        """The name of a token as its files have it, also of a control token; None if it has none."""

    def names_from(self, first: int, *, most: int = 6) -> str:
        """Name the tokens from an id on, for a message.

        Args:
            first: The smallest id.
            most: Number of tokens that are named; three dots stand for the others.
        """
        found = [name for number in range(first, self.vocab_size) if (name := self.name_of(number)) is not None]
        return ", ".join(map(repr, found[:most])) + (", ..." if len(found) > most else "")

    def describe(self) -> dict[str, Any]:
        """What a store records of its tokenizer."""
        names = ("vocab_size", "bos_id", "eos_id", "pad_id")
        return {"sha256": self.fingerprint, **{name: getattr(self, name) for name in names}}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    def __init__(self, model: bytes, source: str) -> None:
        """Build the tokenizer from the content of the file `source`. Raises DataError if it is not a usable model."""
        what = what_file_is(model[:START_BYTES])
        if what:
            advice = TIKTOKEN_ADVICE if is_tiktoken(model[:START_BYTES]) else GIVE_A_TOKENIZER
            raise DataError(f"{source}: not a SentencePiece model: it is {what}. {advice}")
        self.model = model
        self.source = source
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.files = {SENTENCEPIECE_FILE: model}
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # SentencePiece raises RuntimeError or TypeError, depending on the damage
            raise DataError(
                f"{source}: not a SentencePiece model: it is damaged, or of another kind. {GIVE_A_TOKENIZER}"
            ) from error
        self.vocab_size = self.num_text_ids = self._processor.vocab_size()
        bos_id, eos_id, pad_id = self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id()
        if self.vocab_size == 0 or bos_id < 0 or eos_id < 0:
            raise DataError(
                f"{source}: the model has {self.vocab_size} ids, begin-of-sequence {bos_id} and end-of-sequence "
                f"{eos_id}; both are needed. Train it with bos_id and eos_id."
            )
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id if pad_id >= 0 else self._processor.unk_id()

    def __reduce__(self) -> tuple[Any, ...]:
        return _cached_tokenizer, (self.model, self.source)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without begin or end of sequence."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without control tokens and ids that are no words (placeholders, padding rows)."""
        words = [int(i) for i in ids if 0 <= i < self.vocab_size and not self._processor.is_control(int(i))]
        text: str = self._processor.decode(words)
        return text

    def name_of(self, number: int) -> str | None:
        """The piece of that id."""
        return str(self._processor.id_to_piece(number)) if 0 <= number < self.vocab_size else None

    def control_id(self, name: str) -> int | None:
        """The id of the control token of that name; None if there is none."""
        number: int = self._processor.piece_to_id(name)
        return number if self._processor.is_control(number) and self._processor.id_to_piece(number) == name else None


@lru_cache(maxsize=2)
def _cached_tokenizer(model: bytes, source: str) -> SentencePieceTokenizer:
    """The tokenizer of this model, cached: parsing takes 20 ms, and a worker gets it with every part."""
    return SentencePieceTokenizer(model, source)
