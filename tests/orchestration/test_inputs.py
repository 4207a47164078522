"""The files that a recipe names as records: patterns, order, what is refused."""

import gzip
import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.text.conversation import Template
from megatron_deepstack.errors import DataError
from megatron_deepstack.testing.tiny_data import record, write_records
from orchestration.preprocess.sources import reading
from orchestration.preprocess.sources.inputs import _shard_names, read_inputs


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


def test_a_file_is_read_once_however_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path / "a.json", [record("a", [])])
    monkeypatch.chdir(tmp_path)
    assert ids("a.json", "./a.json", f"{tmp_path}/x/../a.json") == ["a"]


def test_a_range_that_counts_down_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x-\{5..1\}.tar: \{5..1\} counts down"):
        ids(f"{tmp_path}/x-{{5..1}}.tar")


def test_absolute_paths_below_an_image_folder_that_is_spelt_another_way(tmp_path: Path) -> None:
    for name in ("images", "other"):
        (tmp_path / name).mkdir()
    file = write_records(tmp_path / "a.json", [record("a", [f"{tmp_path}/images/1.jpg"])])
    inputs = read_inputs([str(file)], f"{tmp_path}/other/../images", Template.V1)
    assert inputs.records[0].images == ("1.jpg",)


def test_names_of_shards_here_and_in_a_bucket_are_no_urls() -> None:
    names = _shard_names([Location("/data/a.tar"), Location("s3://bucket/b.tar")])
    assert list(names.values()) == ["data/a.tar", "s3/bucket/b.tar"]


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
    assert head == "11 of 12 records cannot be used; correct or remove them:"
    assert len(listed) == 10
    assert listed[9].strip().startswith(f"{tmp_path}/b.jsonl, record 2 at line 3 (id ''): has the id ''")
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


def test_reading_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def later() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(reading.time, "monotonic", later)
    files = [write_records(tmp_path / f"{name}.json", [record(name, [])]) for name in "abcd"]
    with tarfile.open(tmp_path / "e.tar", "w") as tar:
        for number in range(9):
            data = json.dumps(record(number, [])).encode()
            info = tarfile.TarInfo(f"{number}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    said: list[str] = []
    paths = [*map(str, files), f"{tmp_path}/e.tar"]
    plain = read_inputs(paths, None, Template.V1)
    watched = read_inputs(paths, None, Template.V1, watch=lambda number: reading.Reading(number, said.append).watch)
    assert watched == plain
    shares = [int(re.fullmatch(LINE, line)[1]) for line in said]  # type: ignore[index]
    assert shares == sorted(shares)
    assert len(shares) >= 3


LINE = r"preprocess: reading records, file \d of 5, (\d+)% of all, ETA (\d:\d\d:\d\d|unknown)"


def test_a_pattern_without_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\*.json: no file matches"):
        ids(f"{tmp_path}/*.json")
