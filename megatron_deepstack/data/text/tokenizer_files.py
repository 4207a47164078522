"""Loading a tokenizer from its files, whatever its kind."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from megatron_deepstack.data.file_kind import START_BYTES, what_file_is
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.text.added_tokens import added_words
from megatron_deepstack.data.text.hf_tokenizer import KEPT_FILES, TEMPLATE_FILE, TOKENIZER_FILE, HuggingFaceTokenizer
from megatron_deepstack.data.text.tokenizer import (
    GIVE_A_TOKENIZER,
    SENTENCEPIECE_FILE,
    SentencePieceTokenizer,
    Tokenizer,
)
from megatron_deepstack.errors import DataError

TOKENIZER_FILES: Final = (SENTENCEPIECE_FILE, TOKENIZER_FILE)
"""Files that are a tokenizer; of a folder with both, the SentencePiece model is the one that the other was made of."""
_SHOWN: Final = 6
"""Words that a message lists."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: A SentencePiece model file, a Hugging Face tokenizer.json, or the folder that holds either. Files beside a
            tokenizer.json that name its special tokens are read with it.

    Returns:
        The tokenizer.

    Raises:
        DataError: The file is missing or is no tokenizer, or words were added to a SentencePiece model, which it does
            not know.
    """
    file = _file_in(Path(path))
    content = _read(file)
    if file.suffix != ".json" and content.lstrip()[:1] not in (b"{", b"["):
        made = SentencePieceTokenizer(content, str(path))
        _require_no_words(made, file.parent)
        return made
    beside = {name: file.with_name(name) for name in KEPT_FILES}
    files = {name: _read(other) for name, other in beside.items() if other.is_file()}
    template = files.get(TEMPLATE_FILE)
    if template and (what := what_file_is(template[:START_BYTES])):
        raise DataError(f"{path}: {TEMPLATE_FILE} is no template: it is {what}")
    return HuggingFaceTokenizer({**files, TOKENIZER_FILE: content}, str(path))


def tokenizer_in(folder: Path) -> Path | None:
    """Find the tokenizer of a folder of weights.

    Args:
        folder: The folder.

    Returns:
        Its SentencePiece model, from which a tokenizer.json beside it was made, unless words were added to it, which
        the tokenizer.json alone knows; or its tokenizer.json; None if it has neither.

    Raises:
        DataError: The SentencePiece model is damaged.
    """
    model, other = folder / SENTENCEPIECE_FILE, folder / TOKENIZER_FILE
    if not model.is_file():
        return other if other.is_file() else None
    if not other.is_file():
        return model
    pieces = SentencePieceTokenizer(_read(model), str(model)).vocab_size
    return other if added_words(folder, pieces) else model


def _require_no_words(tokenizer: SentencePieceTokenizer, folder: Path) -> None:
    words = added_words(folder, tokenizer.vocab_size)
    if words:
        shown = ", ".join(map(repr, words[:_SHOWN])) + (", ..." if len(words) > _SHOWN else "")
        raise DataError(
            f"{tokenizer.source}: {len(words)} words were added to this SentencePiece model by files beside it "
            f"({shown}), and it would cut them into pieces; give the tokenizer.json that knows them "
            "(data.tokenizer=FOLDER/tokenizer.json). transformers writes one: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER)"
        )


def _file_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE):
        if (path / name).is_file():
            return path / name
    raise DataError(f"{path}: the folder holds neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE} (data.tokenizer=...)")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = f"{error.strerror or error}{Location.parse(path).looked_in}"
        raise DataError(f"{path}: the tokenizer cannot be read: {reason}. {GIVE_A_TOKENIZER}") from error
