"""Paths that are not there, all at once and with the folder they were looked for in; and bytes in fitting units."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_deepstack.errors import ConfigError, DataError
from megatron_deepstack.testing.tiny_data import record, tiny_recipe, write_records, write_tokenizer
from orchestration.preprocess.driver.run import preprocess
from orchestration.preprocess.sources.paths import check_paths
from orchestration.preprocess.units import in_units


def test_all_missing_paths_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "there.json", [record("a", [])])
    with pytest.raises(DataError) as caught:
        check_paths(["there.json", "a.json", "/no/b.json", "x-*.json", "t-{0..1}.tar"], "photos", "llama.model")
    here = f" (looked in {os.getcwd()})"
    assert str(caught.value).splitlines() == [
        "7 paths of the recipe are not there:",
        f"  data.records=a.json: no such file{here}",
        "  data.records=/no/b.json: no such file",
        f"  data.records=x-*.json: no file matches{here}",
        f"  data.records=t-0.tar: no such file{here}",
        f"  data.records=t-1.tar: no such file{here}",
        f"  data.tokenizer=llama.model: no such file or folder{here}",
        f"  data.images=photos: no such folder{here}",
        "Correct them in the recipe, or set them behind it.",
    ]


def test_the_first_ten_missing_paths_are_listed() -> None:
    with pytest.raises(DataError, match=r"(?s)31 paths of the recipe are not there:.*\n  ... and 21 more\n"):
        check_paths(["/no/t-{00..29}.tar"], None, "/no/llama.model")


@pytest.mark.parametrize(
    ("records", "images", "tokenizer", "message"),
    [
        (
            "no.json",
            "photos",
            "tiny.model",
            r"no.json: the records cannot be read: No such file .* \(looked in .*\)\. G",
        ),
        ("there.json", "no", "tiny.model", r"no: no such image folder \(data.images=...\)"),
        (
            "there.json",
            "photos",
            "no.model",
            r"no.model: the tokenizer cannot be read: .* \(looked in .*data.tokenizer=...",
        ),
        ("no-*", "photos", "tiny.model", r"no-\*: no file matches \(looked in .*\) \(data.records=...\)"),
        ("no.json", "photos", "no.model", r"2 paths of the recipe are not there"),
    ],
)
def test_one_missing_path_is_named_where_it_is_opened(
    records: str, images: str, tokenizer: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    write_records(tmp_path / "there.json", [record("a", ["a.jpg"])])
    write_tokenizer(tmp_path / "tiny.model")
    with pytest.raises(DataError, match=message):
        preprocess(tiny_recipe(), "store", records=records, images=images, tokenizer=tokenizer, workers=0)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"data.tokenizer is not set: give .* there, or as data.tokenizer=... behind the recipe"),
        ({"tokenizer": "tiny.model"}, r"data.records is not set: give .*, or as data.records=... behind the recipe"),
        (
            {"tokenizer": "tiny.model", "records": "there.json"},
            r"data.images is not set: .* in the recipe or as data.images=... behind it",
        ),
    ],
    ids=["tokenizer", "records", "images"],
)
def test_fields_that_are_not_set(
    given: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "there.json", [record("a", ["a.jpg"])])
    write_tokenizer(tmp_path / "tiny.model")
    with pytest.raises(ConfigError, match=message):
        preprocess(tiny_recipe(), "store", workers=0, **given)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (640_000, "640 kB"),
        (999_600, "1.00 MB"),
        (99_960, "100 kB"),
        (12_345_678, "12.3 MB"),
        (1.5e9, "1.50 GB"),
        (2e12, "2.00 TB"),
    ],
)
def test_units(num_bytes: float, text: str) -> None:
    assert in_units(num_bytes) == text
