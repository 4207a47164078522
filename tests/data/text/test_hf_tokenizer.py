"""Hugging Face's tokenizer files behind the same interface as SentencePiece models."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_deepstack.data.text.hf_tokenizer import HuggingFaceTokenizer
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import DataError
from megatron_deepstack.testing.tiny_chat import (
    LLAMA_3_CONFIG,
    LLAMA_3_TOKENS,
    QWEN_CONFIG,
    QWEN_TOKENS,
    write_chat_tokenizer,
)

TEXTS = ["A photo", "", "\n", "  two", " one", "早上好 é😀", "a </s> b <s>", "What is it?\n\nUSER: 1234 ASSISTANT:"]


def test_the_folder_its_file_and_a_pickle_are_the_same(tmp_path: Path) -> None:
    folder = write_chat_tokenizer(tmp_path / "qwen", QWEN_TOKENS, QWEN_CONFIG)
    one, two = load_tokenizer(folder), load_tokenizer(folder / "tokenizer.json")
    three = pickle.loads(pickle.dumps(one))
    shutil.rmtree(folder)
    for other in (two, three):
        assert other.describe() == one.describe()
        assert [other.encode(text) for text in TEXTS] == [one.encode(text) for text in TEXTS]
    assert set(one.files) == {"tokenizer.json", "tokenizer_config.json"}


def test_any_text_comes_back(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_chat_tokenizer(tmp_path / "llama", LLAMA_3_TOKENS, LLAMA_3_CONFIG))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.bos_id, *ids, -200, tokenizer.eos_id, 10**6]) == text


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (LLAMA_3_CONFIG, ("<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>")),
        ({**LLAMA_3_CONFIG, "pad_token": "<|end_of_text|>"}, ("<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>")),
        ({"eos_token": {"content": "<|eot_id|>", "lstrip": False}}, (None, "<|eot_id|>", "<|eot_id|>")),
        (None, ("<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>")),
    ],
    ids=["config", "with padding", "as objects", "tokenizer.json alone"],
)
def test_special_tokens(config: Any, names: tuple[str | None, ...], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_chat_tokenizer(tmp_path / "llama", LLAMA_3_TOKENS, config))
    ids = tuple(None if name is None else tokenizer.control_id(name) for name in names)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == ids
    assert tokenizer.vocab_size == 1 + max(tokenizer.control_id(name) or 0 for name in LLAMA_3_TOKENS)


def test_special_tokens_map_stands_in_for_the_config(tmp_path: Path) -> None:
    folder = write_chat_tokenizer(tmp_path / "llama", LLAMA_3_TOKENS, {"model_max_length": 10})
    (folder / "special_tokens_map.json").write_text(json.dumps(LLAMA_3_CONFIG))
    assert load_tokenizer(folder).bos_id is not None


def test_the_fingerprint_follows_files_and_special_tokens(tmp_path: Path) -> None:
    def fingerprint(name: str, control: Any, config: Any) -> str:
        return load_tokenizer(write_chat_tokenizer(tmp_path / name, control, config)).fingerprint

    prints = [
        fingerprint("a", LLAMA_3_TOKENS, LLAMA_3_CONFIG),
        fingerprint("b", LLAMA_3_TOKENS, {**LLAMA_3_CONFIG, "eos_token": "<|end_of_text|>"}),
        fingerprint("c", (*LLAMA_3_TOKENS, "<|x|>"), LLAMA_3_CONFIG),
    ]
    assert len({*prints}) == 3
    assert fingerprint("d", LLAMA_3_TOKENS, {**LLAMA_3_CONFIG, "model_max_length": 5}) == prints[0]
    assert all(len(each) == hashlib.sha256().digest_size * 2 for each in prints)


def test_cutting_and_padding_of_the_file_are_not_ours(tmp_path: Path) -> None:
    folder = write_chat_tokenizer(tmp_path / "qwen", QWEN_TOKENS, QWEN_CONFIG)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("What is it? " * 9)) == "What is it? " * 9


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not a Hugging Face tokenizer.json"),
        ("tokenizer.json", '{"version": "1.0"}', "not a Hugging Face tokenizer.json"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not a JSON object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", '{"eos_token": "<nope>"}', "eos_token is '<nope>' by the files beside"),
    ],
)
def test_files_that_are_no_tokenizer(name: str, content: str, message: str, tmp_path: Path) -> None:
    folder = write_chat_tokenizer(tmp_path / "qwen", QWEN_TOKENS, QWEN_CONFIG)
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=f"qwen: .*{message}"):
        load_tokenizer(folder)


def test_folders(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"the folder holds neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.files["tokenizer.model"])
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def as_published(folder: Path) -> None:
    """LLaMA's tokenizer.json as it was published; transformers 5 writes a Metaspace pre-tokenizer instead, which leaves
    out the first of the spaces that a text begins with."""
    document = json.loads((folder / "tokenizer.json").read_text())
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    document["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    document["pre_tokenizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(document))


def converted(model: bytes, folder: Path) -> Tokenizer:
    from transformers import LlamaTokenizer

    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model)
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    as_published(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("which", ["tiny", "llama"])
def test_a_converted_sentencepiece_model_gives_the_same_ids(
    which: str, tmp_path: Path, tokenizer: Tokenizer, request: pytest.FixtureRequest
) -> None:
    if which == "llama":
        folder: Path = request.getfixturevalue("reference")
        tokenizer = load_tokenizer(folder / "tokenizer" / "llama2.model")
    theirs = converted(tokenizer.files["tokenizer.model"], tmp_path / "converted")
    assert isinstance(theirs, HuggingFaceTokenizer)
    assert (theirs.bos_id, theirs.eos_id, theirs.vocab_size) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.vocab_size,
    )
    # Of "▁▁one" transformers' conversion of LLaMA's model merges the two spaces first, SentencePiece "▁one".
    for text in (text for text in TEXTS if which == "tiny" or not text.startswith(" ")):
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids, text
        assert theirs.decode(ids) == tokenizer.decode(ids), text
