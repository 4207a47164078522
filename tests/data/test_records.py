"""Records are read as a whole, or refused with the faulty ones named."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_deepstack.data.conversation import Role, Template, Turn
from megatron_deepstack.data.records import Record, read_records
from megatron_deepstack.errors import DataError
from megatron_deepstack.testing.tiny_data import record

GOOD = record("a", ["x.jpg"])


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
        ("text", r"record 1: is a text, an object was expected"),
        ({"conversations": []}, "record 1: has no id"),
        (changed(id=None), "has no id"),
        (changed(id=True), "has no id"),
        (changed(conversations=None), r"record 1 \(id 'a'\): has no conversations: found nothing, a list of turns"),
        (changed(conversations=[]), "has no conversations: found an empty list"),
        (changed(conversations=["hi"]), "turn 0 is not an object with a text as `value`"),
        (changed(conversations=turns(("human", None))), "turn 0 is not an object with a text as `value`"),
        (changed(conversations=turns(("system", "x"))), "turn 0 has the unknown role 'system'; known: human, gpt"),
        (changed(conversations=turns((["human"], "x"))), "unknown role"),
        (
            changed(conversations=turns(("human", "<image>"))),
            "must alternate, human then gpt, and end with gpt; found human",
        ),
        (changed(conversations=turns(("human", "\ud800"), ("gpt", "x"))), "turn 0 holds half of a surrogate pair"),
        (changed(image=["x.jpg", "y.jpg"]), "has 2 images, but 1 <image> in its conversations"),
        (changed(image=None), "has 0 images, but 1 <image>"),
        (changed(image=3), "`image` holds 3; a path, or a list of paths"),
        (changed(image=""), "`image` holds ''"),
        (changed(image="a\0b"), "`image` holds"),
    ],
)
def test_faulty_records_are_named(item: Any, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([GOOD, item]))
    with pytest.raises(DataError, match=rf"records.json: 1 of 2 records cannot be used(.|\n)*{fault}"):
        read_records(path, Template.V1)


def test_the_first_ten_faults_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([GOOD, *[changed(id="") for _ in range(25)]]))
    with pytest.raises(DataError) as caught:
        read_records(path, Template.V1)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("25 of 26 records cannot be used; mend or remove them:")
    assert [line.split(":")[0].strip() for line in lines[1:11]] == [f"record {n} (id '')" for n in range(1, 11)]
    assert lines[11].strip() == "... and 15 more"


def test_plain_records_need_an_image(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record("a", [])]))
    with pytest.raises(DataError, match="template plain takes a human turn with an <image>"):
        read_records(path, Template.PLAIN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "holds no records"),
        (b"", "holds no records"),
        (b"\n \n", "holds no records"),
        (b"[{]", "not JSON: .*line 1 column 3"),
        (b'{"id": 1}\n{"id": \n', "line 2: not JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b"\xff\xfe[]", "not UTF-8 text"),
    ],
)
def test_files_that_are_no_records(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(path, Template.V1)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.json: the records cannot be read: No such file"):
        read_records(tmp_path / "absent.json", Template.V1)
