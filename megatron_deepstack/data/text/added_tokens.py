"""Words that were added to a SentencePiece model, which stand in files beside it and not in the model itself.

transformers keeps them in added_tokens.json, and newer releases in tokenizer_config.json. The model would cut such a
word into pieces, so that other ids would be trained than those that have been added for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN

_ADDED: Final = "added_tokens.json"
_CONFIG: Final = "tokenizer_config.json"
_SPECIAL: Final = "special_tokens_map.json"
_CONTROL: Final = frozenset({"<pad>", "[PAD]", "<unk>", "<s>", "</s>", IMAGE_TOKEN})
"""Names of tokens that no text holds, if no file says that they are special."""


def added_words(folder: Path, num_pieces: int) -> tuple[str, ...]:
    """Find the words that were added to a SentencePiece model.

    Args:
        folder: Where the model lies.
        num_pieces: Number of its pieces; tokens with smaller ids are its own.

    Returns:
        The words in the order of their ids, without control tokens, which no text gives.

    Raises:
        DataError: A file is not JSON, or holds something else.
    """
    config, names = _read(folder / _CONFIG), _read(folder / _SPECIAL)
    special = _CONTROL | set(_named(config)) | set(_named(names))
    found = {}
    for name, number in _read(folder / _ADDED).items():
        if isinstance(number, int) and name not in special:
            found[name] = number
    decoder = config.get("added_tokens_decoder")
    for key, token in (decoder if isinstance(decoder, Mapping) else {}).items():
        if isinstance(token, Mapping) and str(key).isdecimal():
            name = str(token.get("content"))
            found.pop(name, None)
            if not token.get("special") and name not in special:
                found[name] = int(key)
    return tuple(sorted((name for name, number in found.items() if number >= num_pieces), key=found.__getitem__))


def _named(document: Mapping[str, Any]) -> Iterator[str]:
    """Names of control tokens: values of keys such as `pad_token`, and of lists of additional ones."""
    for key, value in document.items():
        if key.endswith(("_token", "_special_tokens")):
            for one in value if isinstance(value, list) else [value]:
                name = one.get("content") if isinstance(one, Mapping) else one
                if isinstance(name, str):
                    yield name


def _read(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON: {error}; complete the tokenizer's folder") from error
    if not isinstance(found, Mapping):
        raise DataError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found
