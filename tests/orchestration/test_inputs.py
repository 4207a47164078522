"""The files that a recipe names as records: patterns, order, what is refused."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_deepstack.data.conversation import Template
from megatron_deepstack.errors import DataError
from megatron_deepstack.testing.tiny_data import record, write_records
from orchestration.preprocess.inputs import read_inputs


def ids(*patterns: str) -> list[str]:
    return [item.id for item in read_inputs(patterns, None, Template.V1).records]


def test_files_patterns_and_their_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_records(tmp_path / f"{name}.json", [record(name, [])])
    lines = "\n".join(json.dumps(record(f"z{number}", [])) for number in range(2))
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    everything = ids(f"{tmp_path}/c.json", f"{tmp_path}/*.json", f"{tmp_path}/z.*")
    assert everything == ["c", "a", "b", "z0", "z1"]
    write_records(tmp_path / "[x].json", [record("x", [])])
    assert ids(f"{tmp_path}/[x].json") == ["x"]


def test_the_digest_follows_bytes_and_order(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_records(tmp_path / f"{name}.json", [record(name, [])])
    one, two = f"{tmp_path}/a.json", f"{tmp_path}/b.json"
    first, second = (read_inputs(files, None, Template.V1).sha256 for files in ((one, two), (two, one)))
    assert first != second
    write_records(tmp_path / "b.json", [record("b", [], answer="Another.")])
    assert read_inputs((one, two), None, Template.V1).sha256 != first


def test_faults_of_all_files_are_listed_together(tmp_path: Path) -> None:
    write_records(tmp_path / "a.json", [record("", []) for _ in range(8)])
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(record(name, [])) for name in ("", "good", "", "")))
    with pytest.raises(DataError) as caught:
        ids(f"{tmp_path}/a.json", f"{tmp_path}/b.jsonl")
    head, *listed, more = str(caught.value).splitlines()
    assert head == "11 of 12 records cannot be used; mend or remove them:"
    assert len(listed) == 10
    assert listed[9].strip().startswith(f"{tmp_path}/b.jsonl, record 2 at line 3 (id ''): has no id")
    assert more.strip() == "... and 1 more"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "records.json: the records cannot be read: No such file"),
        ("", "records.json: holds no records"),
        ("[]", "records.json: holds no records"),
    ],
)
def test_files_without_records(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "records.json").write_text(content)
    with pytest.raises(DataError, match=message):
        ids(f"{tmp_path}/records.json")


def test_a_pattern_without_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\*.json: no file matches"):
        ids(f"{tmp_path}/*.json")
