"""Text to token ids with a SentencePiece model, as the LLaMA tokenizer that the published data was made with does it.

That is SentencePiece's own encoding (the "slow, legacy" behaviour of Hugging Face's LlamaTokenizer): every separately
encoded piece of text gets the model's dummy prefix. Text never becomes a control token: `</s>` typed by a user is
encoded as those four characters, not as the end of the sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_deepstack.errors import DataError


class Tokenizer:
    """A SentencePiece model. Pickles as its bytes, so that a worker on another machine needs no file."""

    def __init__(self, model: bytes, source: str) -> None:
        """`model` is the content of the file `source`. Raises DataError if it is not a usable model."""
        self.model = model
        self.source = source
        self.fingerprint = hashlib.sha256(model).hexdigest()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # SentencePiece raises RuntimeError or TypeError, by the kind of damage
            raise DataError(f"{source}: not a SentencePiece model ({error}). Give its .model file.") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if self.vocab_size == 0 or self.bos_id < 0 or self.eos_id < 0:
            raise DataError(
                f"{source}: the model has {self.vocab_size} ids, begin-of-sequence {self.bos_id} and end-of-sequence "
                f"{self.eos_id}; both are needed. Train it with bos_id and eos_id."
            )
        pad_id = self._processor.pad_id()
        self.pad_id: int = pad_id if pad_id >= 0 else self._processor.unk_id()

    def __reduce__(self) -> tuple[Any, ...]:
        return _cached_tokenizer, (self.model, self.source)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without begin or end of sequence."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; control tokens and ids that are no words (placeholders, padding rows) are left out."""
        words = [int(i) for i in ids if 0 <= i < self.vocab_size and not self._processor.is_control(int(i))]
        text: str = self._processor.decode(words)
        return text

    def describe(self) -> dict[str, Any]:
        """What a store records of its tokenizer."""
        names = ("vocab_size", "bos_id", "eos_id", "pad_id")
        return {"sha256": self.fingerprint, **{name: getattr(self, name) for name in names}}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a SentencePiece model file; raises DataError if it is missing or is none."""
    try:
        model = Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: the tokenizer cannot be read: {error.strerror or error}. Give a SentencePiece .model file "
            "(data.tokenizer, or --tokenizer)."
        ) from error
    return Tokenizer(model, str(path))


@lru_cache(maxsize=2)
def _cached_tokenizer(model: bytes, source: str) -> Tokenizer:
    """Parsing a model takes 20 ms; a worker gets the same one with every part."""
    return Tokenizer(model, source)
