"""WebDataset shards: groups, order of images, what is refused, and members read at their offset."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_deepstack.data.images.source import QuarantineError, TarMember, read_image
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.records.record import Faults, RecordRules
from megatron_deepstack.data.records.tar_shards import TarShard, read_tar_shard
from megatron_deepstack.data.text.conversation import Template
from megatron_deepstack.errors import DataError
from megatron_deepstack.testing.tiny_data import jpeg_bytes, record

JPEG = jpeg_bytes(30, 20, 0)
LIMIT = 10_000


def write_tar(path: Path, members: Sequence[tuple[str, Any]], form: int = tarfile.PAX_FORMAT, mtime: int = 0) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return path


def talk(images: int = 1, **fields: Any) -> Any:
    item = record("x", [f"{number}.jpg" for number in range(images)])
    return {key: value for key, value in {**item, **fields}.items() if value is not None}


def read(path: Path, template: Template = Template.V1, faults: Faults | None = None) -> TarShard:
    found = faults or Faults()
    with open(path, "rb") as file:
        shard = read_tar_shard(file, Location(str(path)), path.name, RecordRules(template), found)
    if faults is None:
        found.raise_if_any()
    return shard


def test_records_and_their_images(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "s.tar",
        [
            ("./", b""),
            ("a/0001.jpg", JPEG),
            ("a/0001.json", talk(id=None)),
            ("a/0002.json", talk(0, id="text only")),
            ("a/0003.json", talk(2, image=None)),
            ("a/0003.1.PNG", b"later"),
            ("a/0003.0.png", b"first"),
            ("a/0003.cls", b"7"),
            ("README", b"about"),
            ("b/0001.jpg", b"another"),
            ("b/0001.json", talk(id=5)),
        ],
    )
    shard = read(path)
    assert [(item.id, item.images) for item in shard.records] == [
        ("a/0001", ("s.tar/a/0001.jpg",)),
        ("text only", ()),
        ("x", ("s.tar/a/0003.0.png", "s.tar/a/0003.1.PNG")),
        ("5", ("s.tar/b/0001.jpg",)),
    ]
    contents = {name: read_image(member, LIMIT) for name, member in shard.members.items()}
    assert contents == {
        "s.tar/a/0001.jpg": JPEG,
        "s.tar/a/0003.1.PNG": b"later",
        "s.tar/a/0003.0.png": b"first",
        "s.tar/b/0001.jpg": b"another",
    }


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_every_form_of_tar(form: int, tmp_path: Path) -> None:
    stem = "folder/" + "ä" * 40 if form == tarfile.USTAR_FORMAT else "folder/" + "早" * 200
    shard = read(write_tar(tmp_path / "s.tar", [(f"{stem}.jpg", JPEG), (f"{stem}.json", talk())], form))
    assert read_image(shard.members[f"s.tar/{stem}.jpg"], LIMIT) == JPEG


JUNK = [
    ("._0001.jpg", b"\x00\x05\x16\x07"),
    ("a/._0001.json", b"\x00\x05\x16\x07"),
    (".DS_Store", b"Bud1"),
    ("a/.DS_Store", b"Bud1"),
    ("__MACOSX/._0001.jpg", b"x"),
    ("a/__MACOSX/0001.json", b"x"),
    ("PaxHeader/0001.jpg", b"30 mtime=1\n"),
    ("./PaxHeaders.12/0001.json", b"30 mtime=1\n"),
    ("a/Thumbs.db", b"x"),
    ("desktop.ini", b"x"),
]


@pytest.mark.parametrize("junk", JUNK, ids=[name for name, _ in JUNK])
def test_what_systems_put_beside_files_is_left_out(junk: Any, tmp_path: Path) -> None:
    sample = [("0001.jpg", JPEG), junk, ("0001.json", talk()), junk, ("0002.json", talk(0))]
    shard = read(write_tar(tmp_path / "s.tar", [junk, *sample]))
    assert [item.images for item in shard.records] == [("s.tar/0001.jpg",), ()]
    assert list(shard.members) == ["s.tar/0001.jpg"]


@pytest.mark.parametrize(
    ("members", "found"),
    [
        (
            ["photo.v2.jpg", "photo.v2.json", "photo.v3.jpg", "photo.v3.json"],
            {"photo.v2": ["photo.v2.jpg"], "photo.v3": ["photo.v3.jpg"]},
        ),
        (
            ["2024.01.05.jpg", "2024.01.06.jpg", "2024.01.05.json", "2024.01.06.json"],
            {"2024.01.05": ["2024.01.05.jpg"], "2024.01.06": ["2024.01.06.jpg"]},
        ),
        (["a.b.0.jpg", "a.b.1.jpg", "a.b.json"], {"a.b": ["a.b.0.jpg", "a.b.1.jpg"]}),
        (["v.1/0001.jpg", "v.1/0001.json"], {"v.1/0001": ["v.1/0001.jpg"]}),
        (["a.b.jpg", "a.b.json", "a.b.c.jpg", "a.b.c.json"], {"a.b": ["a.b.jpg"], "a.b.c": ["a.b.c.jpg"]}),
        (["a.jpg", "a.json", "a.meta.json"], {"a": ["a.jpg"]}),
    ],
    ids=["versions", "dates", "several images", "dots in folders", "names that begin alike", "another component"],
)
def test_dots_in_names(members: list[str], found: dict[str, list[str]], tmp_path: Path) -> None:
    def content(name: str) -> Any:
        images = [image for image in members if image.endswith("jpg") and image in found.get(name[:-5], [])]
        return JPEG if name.endswith("jpg") else {"fps": 1} if "meta" in name else talk(len(images), id=None)

    shard = read(write_tar(tmp_path / "s.tar", [(name, content(name)) for name in members]))
    assert {item.id: [image[len("s.tar/") :] for image in item.images] for item in shard.records} == found


@pytest.mark.parametrize(
    "item",
    [
        {**talk(2, image=None), "images": ["k.2.jpg", "k.1.jpg"]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": f"k.{n}.jpg"} for n in (2, 1)]},
                {"role": "assistant", "content": "Two."},
            ]
        },
    ],
    ids=["images", "parts of the content"],
)
def test_other_dialects_name_images_of_the_shard(item: Any, tmp_path: Path) -> None:
    shard = read(write_tar(tmp_path / "s.tar", [("k.1.jpg", JPEG), ("k.2.jpg", JPEG), ("k.json", item)]))
    assert shard.records[0].images == ("s.tar/k.2.jpg", "s.tar/k.1.jpg")


@pytest.mark.parametrize(
    ("listed", "order"),
    [
        (None, ["2", "10", "11"]),
        (["k.11.jpg", "k.2.jpg", "k.10.jpg"], ["11", "2", "10"]),
        (["deep/k.10.jpg", "deep/k.2.jpg", "deep/k.11.jpg"], ["10", "2", "11"]),
        (["coco/a.jpg", "coco/b.jpg", "coco/c.jpg"], ["2", "10", "11"]),
        (["k.2.jpg", "k.2.jpg", "k.10.jpg"], ["2", "10", "11"]),
    ],
)
def test_the_order_of_several_images(listed: Any, order: list[str], tmp_path: Path) -> None:
    images = [(f"k.{number}.jpg", JPEG) for number in (10, 11, 2)]
    shard = read(write_tar(tmp_path / "s.tar", [*images, ("k.json", talk(3, image=listed))]))
    assert shard.records[0].images == tuple(f"s.tar/k.{number}.jpg" for number in order)


def test_captions(tmp_path: Path) -> None:
    members = [
        ("1.jpg", JPEG),
        ("1.txt", b" A photo.\n"),
        ("2.jpg", JPEG),
        ("2.txt", "早".encode()),
        ("2.json", {"url": "https://example.org", "width": 30}),
    ]
    path = write_tar(tmp_path / "s.tar", members)
    shard = read(path, Template.PLAIN)
    assert [(item.id, item.turns[0].text, item.turns[1].text) for item in shard.records] == [
        ("1", "<image>", "A photo."),
        ("2", "<image>", "早"),
    ]
    with pytest.raises(DataError, match=r"s.tar, 1: holds a caption, which only data.template=plain learns; it is v1"):
        read(path)


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        (
            [("1.jpg", JPEG), ("1.cls", b"7")],
            "s.tar, 1: has images, but neither a .json nor a .txt; names are cut at their first dot: 1.jpg, 1.cls",
        ),
        (
            [("1.jpg", JPEG), ("1.json", talk()), ("1.b.jpg", JPEG), ("1.b.json", talk())],
            "are cut at their first dot, so these are one sample: 1.json, 1.b.json, 1.jpg, 1.b.jpg; both 1.b.json",
        ),
        (
            [("1.json", talk(0)), ("1.b.json", talk(0))],
            "these are one sample: 1.json, 1.b.json; .* Write names with one dot",
        ),
        ([("1.a.jpg", JPEG), ("1.b.json", talk())], "1.a.jpg has the name of none of its texts. Write names with one"),
        ([(".1.jpg", JPEG), (".1.json", talk())], ".1.jpg begins with a dot, which no sample's name does; rename it"),
        ([("1.jpg", JPEG), ("1.json", talk(video="c.mp4"))], r"holds `video`, not read here"),
        (
            [("1.heic", JPEG), ("1.txt", "A photo.")],
            "1: has a caption, but no image with a known ending; .*lies 1.heic",
        ),
        ([("1.txt", "A photo.")], "s.tar, 1: has a caption, but no image with a known ending$"),
        ([("1.json", b"{")], "its .json is not JSON"),
        ([("1.json", [talk()])], "is a list, an object was expected"),
        ([("1.json", {"id": 1})], r"\(id 1\): has no conversations"),
        ([("1.json", talk(1))], "has 0 images, but 1 <image>"),
        ([("1.jpg", JPEG), ("1.json", talk(0))], "has 1 images, but 0 <image>"),
        ([("1.jpg", JPEG), ("2.json", talk(0)), ("1.json", talk())], "do not lie next to each other"),
        ([("1.jpg", JPEG), ("1.jpg", JPEG), ("1.json", talk(2))], "1.jpg is in the shard twice"),
        ([("../../1.jpg", JPEG), ("../../1.json", talk())], "which leaves the image folder"),
    ],
)
def test_faulty_groups_are_named(members: Any, fault: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"cannot be used(.|\n)*{fault}"):
        read(write_tar(tmp_path / "s.tar", members))


def test_links_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"1.jpg is no plain file"):
        read(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "not a tar shard, or a damaged one: it is an empty file"),
        (lambda data: b"text" * 1000, "not a tar shard, or a damaged one"),
        (gzip.compress, "a tar compressed with gzip. .*: unpack it, and name the .tar"),
        (lambda data: data[:2000], "not a tar shard, or a damaged one: unexpected end of data"),
        (lambda data: data[:1024], "the shard is cut short"),
        (lambda data: data[:1024] + b"\x01" * 512 + data[1536:], "the shard is damaged at byte 1024"),
    ],
)
def test_files_that_are_no_whole_tar(damage: Any, message: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("1.json", talk(0)), ("2.jpg", JPEG * 2), ("2.json", talk())])
    assert os.path.getsize(path) > 4096
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=f"s.tar: {message}"):
        read(path)


def test_the_digest_follows_texts_names_sizes_and_times(tmp_path: Path) -> None:
    def digest(*members: tuple[str, Any], mtime: int = 0) -> str:
        return read(write_tar(tmp_path / "s.tar", members, mtime=mtime)).sha256

    first = digest(("1.jpg", JPEG), ("1.json", talk()))
    assert first == digest(("1.jpg", JPEG), ("1.json", talk()))
    others = [
        digest(("1.jpg", JPEG), ("1.json", talk(id="y"))),
        digest(("1.jpg", JPEG + b"x"), ("1.json", talk())),
        digest(("2.jpg", JPEG), ("2.json", talk())),
        digest(("1.jpg", JPEG), ("1.json", talk()), mtime=1),
    ]
    assert len({first, *others}) == 5


def test_a_shard_that_is_replaced_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("1.jpg", JPEG), ("1.json", talk())])
    member = read(path).members["s.tar/1.jpg"]
    write_tar(path, [("2.jpg", JPEG), ("2.json", talk())])
    with pytest.raises(DataError, match=r"s.tar: has changed since the job began"):
        read_image(member, LIMIT)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match="has changed"):
        read_image(member, LIMIT)
    path.unlink()
    with pytest.raises(DataError, match=r"s.tar: reading failed: No such file"):
        read_image(member, LIMIT)


def test_members_that_cannot_be_images(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("1.0.jpg", b""), ("1.1.jpg", bytes(200_000)), ("1.json", talk(2))])
    empty, huge = read(path).members.values()
    with pytest.raises(QuarantineError, match="the file is empty"):
        read_image(empty, LIMIT)
    with pytest.raises(QuarantineError, match="200000 bytes, too many for 10000 pixels"):
        read_image(huge, LIMIT)
    assert isinstance(huge, TarMember)
