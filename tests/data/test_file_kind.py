"""Files that are not what their names promise: recognised by their first bytes, wherever users' files are opened."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_deepstack.convert.tensor_files import files_by_name, read_tensor
from megatron_deepstack.data.file_kind import is_tiktoken, what_file_is, what_is_at
from megatron_deepstack.data.images.pictures import decode_image
from megatron_deepstack.data.images.source import QuarantineError
from megatron_deepstack.data.text.conversation import Template
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import CheckpointError, DataError
from megatron_deepstack.testing.tiny_chat import QWEN_CONFIG, QWEN_TOKENS, write_chat_tokenizer
from megatron_deepstack.testing.tiny_data import jpeg_bytes, write_tokenizer
from orchestration.preprocess.sources.inputs import read_inputs

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 499723\n" % (b"9e" * 32)
HTML = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
TIKTOKEN = b"".join(base64.b64encode(bytes([n, n + 1])) + b" %d\n" % n for n in range(60))

KINDS = {
    "LFS pointer": (LFS, "a Git LFS pointer for a file of 499723 bytes: run `git lfs pull`"),
    "LFS pointer with Windows' line ends": (LFS.replace(b"\n", b"\r\n"), "a Git LFS pointer"),
    "git-annex pointer": (b"/annex/objects/SHA256E-s5--aa.model\n", "a git-annex pointer: run `git annex get`"),
    "HTML": (HTML, "an HTML page"),
    "HTML in capitals": (b"<HTML><BODY>404</BODY></HTML>", "an HTML page"),
    "XHTML": (b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "x">', "an HTML page"),
    "refusal of a bucket": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    "empty": (b"", r"an empty file \(0 bytes\)"),
    "zero bytes": (bytes(900), "a file of zero bytes only"),
    "tiktoken": (TIKTOKEN, "a tiktoken vocabulary"),
    "gzip": (gzip.compress(b"x"), "data compressed with gzip: unpack it"),
    "Parquet": (b"PAR1\x15\x04", "a Parquet file: write its rows as JSON lines"),
    "GGUF": (b"GGUF\x03\0\0\0", "a GGUF file"),
    "JPEG": (jpeg_bytes(8, 8, 0), "a JPEG image"),
    "AppleDouble": (b"\x00\x05\x16\x07\x00\x02", "a resource fork of macOS"),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name: str, tmp_path: Path) -> None:
    content, what = KINDS[name]
    (tmp_path / "file").write_bytes(content)
    found = what_is_at(tmp_path / "file")
    assert found is not None
    assert re.match(what, found)


@pytest.mark.parametrize(
    "content", [b"[]", b'{"id": 1}', b"text", b" \n ", b"\n\x05<unk>", b"YQ== x\n", b"version 1\n", b"word 12\n"]
)
def test_what_is_not_known_is_not_guessed(content: bytes) -> None:
    assert what_file_is(content) is None or is_tiktoken(content)
    assert is_tiktoken(content) == (content == b"word 12\n"), "four letters and a number are base64"


def test_the_right_files_are_not_taken_for_others(tmp_path: Path) -> None:
    assert what_is_at(write_tokenizer(tmp_path / "tiny.model")) is None
    folder = write_chat_tokenizer(tmp_path / "qwen", QWEN_TOKENS, QWEN_CONFIG)
    assert what_is_at(folder / "tokenizer.json") is None
    assert what_is_at(tmp_path / "absent") is None


def as_tokenizer_model(path: Path) -> Any:
    return load_tokenizer(path.rename(path.with_name("tokenizer.model")))


def as_tokenizer_json(path: Path) -> Any:
    return load_tokenizer(path.rename(path.with_name("tokenizer.json")).parent)


def as_tokenizer_config(path: Path) -> Any:
    folder = write_chat_tokenizer(path.parent / "qwen", QWEN_TOKENS, QWEN_CONFIG)
    path.rename(folder / "tokenizer_config.json")
    return load_tokenizer(folder)


def as_chat_template(path: Path) -> Any:
    folder = write_chat_tokenizer(path.parent / "qwen", QWEN_TOKENS, QWEN_CONFIG)
    path.rename(folder / "chat_template.jinja")
    return load_tokenizer(folder)


def as_records(path: Path) -> Any:
    return read_inputs([str(path.rename(path.with_name("records.json")))], None, Template.V1)


def as_shard(path: Path) -> Any:
    return read_inputs([str(path.rename(path.with_name("shard.tar")))], None, Template.V1)


def as_image(path: Path) -> Any:
    return decode_image(path.read_bytes(), 10**6)


def as_safetensors(path: Path) -> Any:
    return files_by_name(path.rename(path.with_name("model.safetensors")))


def as_folder_of_weights(path: Path) -> Any:
    path.rename(path.with_name("model.safetensors"))
    return files_by_name(path.parent)


def as_one_tensor(path: Path) -> Any:
    return read_tensor(path.rename(path.with_name("model.safetensors")), "x")


def as_pytorch(path: Path) -> Any:
    return files_by_name(path.rename(path.with_name("pytorch_model.bin")))


def as_index(path: Path) -> Any:
    path.rename(path.with_name("model.safetensors.index.json"))
    return files_by_name(path.parent)


PLACES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "tokenizer.model": (as_tokenizer_model, DataError, "tokenizer.model: not a SentencePiece model: it is"),
    "tokenizer.json": (as_tokenizer_json, DataError, "not a Hugging Face tokenizer.json: it is"),
    "tokenizer_config.json": (as_tokenizer_config, DataError, "tokenizer_config.json is not JSON: it is"),
    "chat_template.jinja": (as_chat_template, DataError, "chat_template.jinja is no template: it is"),
    "records": (as_records, DataError, "records.json: not a file of records: it is"),
    "tar shard": (as_shard, DataError, "shard.tar: not a tar shard, or a damaged one: it is"),
    "image": (as_image, QuarantineError, "not an image of a known format: it is"),
    "safetensors": (as_safetensors, CheckpointError, "model.safetensors: cannot be read as safetensors: it is"),
    "folder of weights": (as_folder_of_weights, CheckpointError, "cannot be read as safetensors: it is"),
    "one tensor": (as_one_tensor, CheckpointError, "model.safetensors: cannot read x: it is"),
    "PyTorch weights": (as_pytorch, CheckpointError, "pytorch_model.bin: cannot be read as .*: it is"),
    "index of weights": (as_index, CheckpointError, "index.json: cannot be read as an index of tensors: it is"),
}


@pytest.mark.parametrize(("content", "what"), [(LFS, "a Git LFS pointer"), (HTML, "an HTML page")], ids=["LFS", "HTML"])
@pytest.mark.parametrize("place", PLACES)
def test_pointers_and_pages_in_place_of_files(place: str, content: bytes, what: str, tmp_path: Path) -> None:
    read, error, message = PLACES[place]
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(error, match=f"{message} {what}") as caught:
        read(tmp_path / "file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["tokenizer.model", "tokenizer.json", "safetensors", "PyTorch weights"])
def test_empty_files(place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    read, error, message = PLACES[place]
    (tmp_path / "file").touch()
    with pytest.raises(error, match=rf"{message} an empty file \(0 bytes\): fetch or write it again"):
        read(tmp_path / "file")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "content", [b"not a model", bytes(range(1, 200)), b"\x08\x01" * 50], ids=["text", "bytes", "pb"]
)
def test_no_line_of_c_in_what_is_said_of_a_tokenizer(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(
        DataError, match=r"not a SentencePiece model: it is damaged, or of another kind. Give a"
    ) as caught:
        as_tokenizer_model(tmp_path / "file")
    assert ".cc" not in str(caught.value)
    assert "data.tokenizer=..." in str(caught.value)


def test_a_tiktoken_file_is_told_what_to_take_instead(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(TIKTOKEN)
    with pytest.raises(DataError, match=r"it is a tiktoken vocabulary .*: give the tokenizer.json of the same release"):
        as_tokenizer_model(tmp_path / "file")


@pytest.mark.parametrize(
    ("document", "what"),
    [
        ({"model_type": "llama"}, "it is a model's config.json"),
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}, "it is a tokenizer_config.json"),
        ({"bos_token": "<s>"}, "it is a special_tokens_map.json"),
        ({"a": 0, "b": 1}, "it is a vocab.json, which lacks the merges"),
        ({"weight_map": {}}, "it is an index of weights"),
        ({"x": {}}, "it is JSON, but has no `model`, an object"),
        ([], "it is JSON, but a list"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_json_of_another_kind(name: str, document: Any, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(document))
    with pytest.raises(DataError, match=rf"not a Hugging Face tokenizer.json: {what}.*data.tokenizer=..."):
        load_tokenizer(tmp_path / name)
