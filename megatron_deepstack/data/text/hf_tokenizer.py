"""Hugging Face's tokenizers: a tokenizer.json, with the tokenizer_config.json beside it if there is one.

tokenizer_config.json (or special_tokens_map.json) names the tokens that begin and end a sequence. A tokenizer.json
alone does not name them, so the usual names are looked up among its control tokens. Text never becomes a control token,
as with `split_special_tokens` of transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from tokenizers import Tokenizer as Backend

from megatron_deepstack.data.file_kind import START_BYTES, what_file_is
from megatron_deepstack.data.text.tokenizer import GIVE_A_TOKENIZER, Tokenizer
from megatron_deepstack.errors import DataError

TOKENIZER_FILE: Final = "tokenizer.json"
_TOKENS_FILES: Final = ("tokenizer_config.json", "special_tokens_map.json")
"""Files that name the special tokens; the first one has precedence."""
TEMPLATE_FILE: Final = "chat_template.jinja"
KEPT_FILES: Final = (TOKENIZER_FILE, *_TOKENS_FILES, TEMPLATE_FILE)
"""Files of a tokenizer's folder that belong to it."""
_USUAL_NAMES: Final = {
    "bos": ("<|begin_of_text|>", "<s>", "<bos>"),
    "eos": ("<|end_of_text|>", "</s>", "<|endoftext|>", "<eos>"),
    "pad": ("<pad>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>"),
}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, files: Mapping[str, bytes], source: str) -> None:
        """Build the tokenizer from files: contents by name, with a tokenizer.json. Raises DataError if that fails."""
        self.files = dict(files)
        self.source = source
        try:
            self._backend = Backend.from_buffer(files[TOKENIZER_FILE])
        except Exception as error:  # `tokenizers` raises plain Exceptions
            reason = _what_it_is(files[TOKENIZER_FILE]) or " ".join(str(error).split())
            raise DataError(f"{source}: not a Hugging Face tokenizer.json: {reason}. {GIVE_A_TOKENIZER}") from error
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._control = {
            token.content: number for number, token in self._backend.get_added_tokens_decoder().items() if token.special
        }
        numbers = set(self._backend.get_vocab(with_added_tokens=True).values())
        self.vocab_size = max(numbers, default=-1) + 1
        self.num_text_ids = max(numbers - set(self._control.values()), default=-1) + 1
        tokens = self._special_tokens()
        self.bos_id, self.eos_id = tokens["bos"], tokens["eos"]
        self.pad_id = next((i for i in (tokens["pad"], self.eos_id) if i is not None), 0)
        self.fingerprint = hashlib.sha256(files[TOKENIZER_FILE] + json.dumps(tokens).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return _cached_tokenizer, (tuple(self.files.items()), self.source)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without begin or end of sequence."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without control tokens and ids that are no words (placeholders, padding rows)."""
        words = [int(i) for i in ids if 0 <= i < self.vocab_size]
        text: str = self._backend.decode(words, skip_special_tokens=True)
        return text

    def name_of(self, number: int) -> str | None:
        """The token of that id; None if there is none."""
        name: str | None = self._backend.id_to_token(number)
        return name

    def control_id(self, name: str) -> int | None:
        """The id of the control token of that name; None if there is none."""
        return self._control.get(name)

    def _special_tokens(self) -> dict[str, int | None]:
        """Ids of begin, end and padding."""
        named = [_read_object(name, self.files[name], self.source) for name in _TOKENS_FILES if name in self.files]
        if not named:
            return {role: next(self._known(names), None) for role, names in _USUAL_NAMES.items()}
        tokens = {role: _token_name(f"{role}_token", named) for role in _USUAL_NAMES}
        return {role: None if name is None else self._must_know(role, name) for role, name in tokens.items()}

    def _known(self, names: Sequence[str]) -> Any:
        return (self._control[name] for name in names if name in self._control)

    def _must_know(self, role: str, name: str) -> int:
        number: int | None = self._backend.token_to_id(name)
        if number is None:
            raise DataError(
                f"{self.source}: {role}_token is {name!r} by the files beside {TOKENIZER_FILE}, which has no such token"
            )
        return number


def _token_name(key: str, documents: Sequence[Mapping[str, Any]]) -> str | None:
    """A token's name: a text, or an object with its `content`."""
    for document in documents:
        value = document.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        if isinstance(name, str):
            return name
    return None


_OTHER_DOCUMENTS: Final = {
    "model_type": "a model's config.json",
    "architectures": "a model's config.json",
    "tokenizer_class": "a tokenizer_config.json",
    "added_tokens_decoder": "a tokenizer_config.json",
    "bos_token": "a special_tokens_map.json",
    "eos_token": "a special_tokens_map.json",
    "weight_map": "an index of weights",
}
"""For a key of a JSON object that lacks a tokenizer's `model`, what that object is."""


def _what_it_is(content: bytes) -> str | None:
    """What was given in place of a tokenizer.json; None if it is not known."""
    what = what_file_is(content[:START_BYTES])
    if what:
        return f"it is {what}"
    try:
        document = json.loads(content)
    except ValueError as error:
        return f"it is not JSON: {error}"
    if not isinstance(document, dict):
        return f"it is JSON, but {'a list' if isinstance(document, list) else 'no object'}"
    if isinstance(document.get("model"), dict):
        return None
    if document and all(isinstance(number, int) for number in document.values()):
        return "it is a vocab.json, which lacks the merges and the rules that split a text"
    known = next((name for key, name in _OTHER_DOCUMENTS.items() if key in document), None)
    return f"it is {known}" if known else "it is JSON, but has no `model`, an object"


def _read_object(name: str, content: bytes, source: str) -> dict[str, Any]:
    what = what_file_is(content[:START_BYTES])
    if what:
        raise DataError(f"{source}: {name} is not JSON: it is {what}")
    try:
        document = json.loads(content)
    except ValueError as error:
        raise DataError(f"{source}: {name} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise DataError(f"{source}: {name} is not a JSON object")
    return document


@lru_cache(maxsize=2)
def _cached_tokenizer(files: tuple[tuple[str, bytes], ...], source: str) -> HuggingFaceTokenizer:
    """The tokenizer of these files, cached: parsing a large one takes a second, and every part needs it."""
    return HuggingFaceTokenizer(dict(files), source)
