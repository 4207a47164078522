"""Records are read as a whole, or refused with the faulty ones named."""

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_deepstack.data.records import record_files
from megatron_deepstack.data.records.record import Faults, Record, RecordRules
from megatron_deepstack.data.records.record_files import RecordFile, read_record_file
from megatron_deepstack.data.records.turns import Role, Turn
from megatron_deepstack.data.text.conversation import Template
from megatron_deepstack.errors import DataError
from megatron_deepstack.testing.tiny_data import record, write_records

GOOD = record("a", ["x.jpg"])


def read_records(path: Path, template: Template, folder: str = "") -> RecordFile:
    faults = Faults()
    with open(path, "rb") as file:
        found = read_record_file(file, path.name, RecordRules(template, folder), faults)
    faults.raise_if_any()
    return found


def changed(**fields: Any) -> Any:
    return {**record("a", ["x.jpg"]), **fields}


def turns(*pairs: tuple[str, Any]) -> list[Any]:
    return [{"from": role, "value": value} for role, value in pairs]


def test_json_and_json_lines_are_the_same_records(tmp_path: Path) -> None:
    items = [record(1, ["x.jpg"]), record("b", []), record("c", ["x.jpg", "y.jpg"])]
    (tmp_path / "list.json").write_text("\ufeff" + json.dumps(items))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(item, ensure_ascii=False) for item in items) + "\n\n")
    first, second = (read_records(tmp_path / name, Template.V1) for name in ("list.json", "lines.jsonl"))
    assert first.records == second.records
    assert first.sha256 != second.sha256
    expected = (Turn(Role.HUMAN, "<image>\nWhat is it?"), Turn(Role.GPT, "A photo."))
    assert first.records[0] == Record("1", ("x.jpg",), expected)
    assert [len(item.images) for item in first.records] == [1, 0, 2]


@pytest.mark.parametrize(
    ("item", "fault"),
    [
        ("text", r"record 1 at line 1: is a text, an object was expected"),
        ({"id": 7}, r"record 1 at line 1 \(id 7\): has no conversations: found nothing"),
        (changed(id=True), "has the id True; a text or a whole number was expected, or no `id` at all"),
        (changed(id=""), "has the id ''"),
        (changed(conversations=None), r"record 1 at line 1 \(id 'a'\): has no conversations: found nothing, a"),
        (changed(conversations=[]), "has no conversations: found an empty list"),
        (changed(conversations=["hi"]), "turn 0 is not an object with a text as `value`"),
        (changed(conversations=turns(("human", None))), "turn 0 is not an object with a text as `value`"),
        (changed(conversations=turns(("narrator", "x"))), "turn 0 has the unknown role 'narrator'; known: human, user"),
        (changed(conversations=turns((["human"], "x"))), "unknown role"),
        (
            changed(conversations=turns(("human", "<image>"))),
            "must alternate, human then gpt, and end with gpt; found human",
        ),
        (changed(conversations=turns(("human", "\ud800"), ("gpt", "x"))), "turn 0 holds half of a surrogate pair"),
        ({"data": [GOOD, GOOD]}, "is one object whose `data` holds records; write that list alone into the file"),
        (changed(image=["x.jpg", "y.jpg"]), "has 2 images, but 1 <image> in its conversations"),
        (changed(image=None), "has 0 images, but 1 <image>"),
        (changed(image=3), "`image` holds 3; a path, or a list of paths"),
        (changed(image=[""]), "`image` holds ''"),
        (changed(image=""), "has 0 images, but 1 <image> in its conversations; write one <image> where each"),
        (changed(image="a\0b"), "`image` holds"),
    ],
)
def test_faulty_records_are_named(item: Any, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([GOOD, item]))
    with pytest.raises(DataError, match=rf"1 of 2 records cannot be used; .*:\n  records.json, (.|\n)*{fault}"):
        read_records(path, Template.V1)


def test_the_first_ten_faults_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([GOOD, *[changed(id="") for _ in range(25)]]))
    with pytest.raises(DataError) as caught:
        read_records(path, Template.V1)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("25 of 26 records cannot be used; correct or remove them:")
    assert [line.split(":")[0].strip() for line in lines[1:11]] == [
        f"records.json, record {n} at line 1 (id '')" for n in range(1, 11)
    ]
    assert lines[11].strip() == "... and 15 more"


def test_plain_records_need_an_image(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record("a", [])]))
    with pytest.raises(DataError, match="template plain takes a human turn with an <image>"):
        read_records(path, Template.PLAIN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{]", "line 1: not JSON: Expecting property name.*, 1 characters into the value. A records file is"),
        (b'{"id": 1, "conversations": 2}\n{"id": \n', "line 2: not JSON"),
        (b"[1 2]", "',' expected, found '2'"),
        (b"[1, ]", "a comma before the end of the list"),
        (b"[1, 2", "the list has no end"),
        (b"[] []", "something follows the list"),
        (b"[" * 200_000, "nested too deeply"),
        (b"\xff\xfe[]", "not UTF-8 text"),
        (b"[" + b"1" * 5000 + b"]", "line 1: not JSON: Exceeds the limit"),
        (gzip.compress(b"[]" * 500, mtime=0)[:-9], "cannot be unpacked: .* Fetch or compress it again"),
        (gzip.compress(b"[]", mtime=0) + b"rubbish", "cannot be unpacked: Not a gzipped file"),
    ],
)
def test_files_that_are_no_records(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(path, Template.V1)


@pytest.mark.parametrize("content", [b"[]", b"", b"\n \n", gzip.compress(b"", mtime=0)])
def test_files_without_records(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_bytes(content)
    assert read_records(path, Template.V1) == RecordFile(hashlib.sha256(content).hexdigest(), ())


@pytest.mark.parametrize("block", [1, 3, 17, 1000])
def test_values_across_blocks(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_files, "_BLOCK_CHARS", block)
    items = [record(number, ["早.jpg"], answer="x" * number + "\n") for number in range(40)]
    (tmp_path / "list.json").write_text(json.dumps(items, indent=1, ensure_ascii=False))
    (tmp_path / "lines.jsonl").write_text("\r\n".join(json.dumps(item) for item in items))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress((tmp_path / "lines.jsonl").read_bytes(), mtime=0))
    first, *others = (read_records(tmp_path / name, Template.V1) for name in sorted(os.listdir(tmp_path)))
    assert len(first.records) == 40
    assert all(other.records == first.records for other in others)
    (tmp_path / "lines.jsonl").write_text(json.dumps(items[0]) + "\n\n" + '{"id": "x", "y" 1}' + "\n" * 5000)
    with pytest.raises(DataError, match="line 3: not JSON: Expecting ':'"):
        read_records(tmp_path / "lines.jsonl", Template.V1)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        ("./a//b.jpg", "a/b.jpg"),
        ("a/../b.jpg", "b.jpg"),
        ("/photos/a.jpg", "a.jpg"),
        ("/photos/../photos/a.jpg", "a.jpg"),
        ("..a.jpg", "..a.jpg"),
    ],
)
def test_images_have_one_spelling(image: str, found: str, tmp_path: Path) -> None:
    path = write_records(tmp_path / "records.json", [record("a", [image])])
    assert read_records(path, Template.V1, "/photos").records[0].images == (found,)


@pytest.mark.parametrize(
    ("image", "fault"),
    [
        ("/etc/passwd", "is '/etc/passwd', outside the image folder /photos"),
        ("/photosphere/a.jpg", "outside the image folder /photos"),
        ("../etc/passwd", "which leaves the image folder"),
        ("a/../../photos/b.jpg", "which leaves the image folder"),
        ("/photos/../etc/passwd", "outside the image folder"),
        ("https://example.org/a.jpg", "is the URL 'https://example.org/a.jpg'"),
    ],
)
def test_images_lie_in_the_image_folder(image: str, fault: str, tmp_path: Path) -> None:
    path = write_records(tmp_path / "records.json", [record("a", [image])])
    with pytest.raises(DataError, match=fault):
        read_records(path, Template.V1, "/photos")


@pytest.mark.parametrize("where", ["record", "turn"])
def test_a_key_that_stands_twice_is_a_fault(where: str, tmp_path: Path) -> None:
    """JSON readers keep the last one, and drop what the others say."""
    text = json.dumps([GOOD])
    old, new = (
        ('"id":', '"image": "y.jpg", "id":') if where == "record" else ('"from": "gpt"', '"value": "B", "from": "gpt"')
    )
    path = tmp_path / "records.json"
    path.write_text(text.replace(old, new, 1))
    key = "image" if where == "record" else "value"
    with pytest.raises(DataError, match=f"record 0 at line 1 .*holds the key `{key}` more than once"):
        read_records(path, Template.V1)
