"""Words beside a SentencePiece model that it does not know: taken from a tokenizer.json, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_deepstack.data.text.tokenizer_files import load_tokenizer, tokenizer_in
from megatron_deepstack.errors import DataError
from megatron_deepstack.testing.tiny_chat import QWEN_CONFIG, QWEN_TOKENS, write_chat_tokenizer
from megatron_deepstack.testing.tiny_data import write_tokenizer

BESIDE = "added_tokens.json"
CONFIG = "tokenizer_config.json"

# id, files beside the model, the words that no piece stands for
CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("nothing", {}, []),
    ("words", {BESIDE: {"<loc_1>": 401, "<loc_0>": 400}}, ["<loc_0>", "<loc_1>"]),
    ("control", {BESIDE: {"<pad>": 400, "<image>": 401}}, []),
    ("named", {BESIDE: {"<sep>": 400}, CONFIG: {"sep_token": {"content": "<sep>"}}}, []),
    ("listed", {BESIDE: {"<a>": 400}, "special_tokens_map.json": {"additional_special_tokens": ["<a>"]}}, []),
    (
        "of-newer-releases",
        {CONFIG: {"added_tokens_decoder": {"2": {"content": "</s>"}, "400": {"content": "zoom", "special": False}}}},
        ["zoom"],
    ),
    ("special", {CONFIG: {"added_tokens_decoder": {"400": {"content": "<x>", "special": True}}}}, []),
    ("own-piece", {BESIDE: {"the": 17}}, []),
]


@pytest.mark.parametrize(("files", "words"), [row[1:] for row in CASES], ids=[row[0] for row in CASES])
def test_added_words_are_refused_by_name(tmp_path: Path, files: dict[str, Any], words: list[str]) -> None:
    model = write_tokenizer(tmp_path / "tokenizer.model")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    if not words:
        assert load_tokenizer(tmp_path).vocab_size == 400
        assert tokenizer_in(tmp_path) == model
        return
    shown = ", ".join(map(repr, words))
    with pytest.raises(DataError) as caught:
        load_tokenizer(model)
    assert f"{len(words)} words were added to this SentencePiece model by files beside it ({shown})" in str(
        caught.value
    )
    other = write_chat_tokenizer(tmp_path / "other", QWEN_TOKENS, QWEN_CONFIG)
    (tmp_path / "tokenizer.json").write_bytes((Path(other) / "tokenizer.json").read_bytes())
    assert tokenizer_in(tmp_path) == tmp_path / "tokenizer.json"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / BESIDE).write_text('{"<a>": 4')
    with pytest.raises(DataError, match=r"added_tokens.json: cannot be read as JSON"):
        load_tokenizer(tmp_path)


def test_tokens_without_a_row_are_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_chat_tokenizer(tmp_path / "words", QWEN_TOKENS, QWEN_CONFIG))
    first = tokenizer.vocab_size - 2
    assert tokenizer.names_from(first) == ", ".join(repr(tokenizer.name_of(n)) for n in (first, first + 1))
    assert tokenizer.names_from(0, most=1).endswith(", ...")
    pieces = load_tokenizer(write_tokenizer(tmp_path / "tokenizer.model"))
    assert pieces.names_from(399) == repr(pieces.name_of(399))
    assert pieces.name_of(400) is None
