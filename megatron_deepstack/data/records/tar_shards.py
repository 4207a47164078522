"""WebDataset tar shards: records and captions are read, images only noted, with the offset they are read at later.

Members that follow each other and share a name up to its first dot belong together: KEY.json is a LLaVA-style record
(its id is KEY if it has none), its images are KEY.jpg, or KEY.0.jpg, KEY.1.jpg, ... A KEY.txt beside an image, without
a conversation, is a caption. Images are never unpacked, so a shard must not be compressed. A shard's digest covers
names, sizes and times of all members and the content of its texts; like files in a folder, pixels are not read for it.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final

from megatron_deepstack.data.images.source import TarMember
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.records.record import Faults, Record, RecordRules, parse_record
from megatron_deepstack.data.text.conversation import Template
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.tokens import IMAGE_TOKEN

_IMAGES: Final = {
    "jpg",
    "jpeg",
    "png",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "ppm",
    "jp2",
    "avif",
    "jfif",
    "img",
    "image",
}
"""Endings of images in shards."""
_TEXTS: Final = {"json", "txt"}
_MOST_TEXT_BYTES: Final = 1 << 28
"""Size of the largest record; a text that is larger is something else."""
_COMPRESSED: Final = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class TarShard:
    """What a shard holds."""

    sha256: str
    """Of names, sizes and times of its members, and of its texts."""
    records: tuple[Record, ...]
    members: dict[str, TarMember]
    """Its images by the path that its records give."""


def read_tar_shard(file: IO[bytes], location: Location, name: str, rules: RecordRules, faults: Faults) -> TarShard:
    """Read and check all records of an open shard; images get the path `name`/MEMBER. Faulty records go into `faults`.

    Raises DataError when the file is no tar, is compressed, or ends too soon.
    """
    digest = hashlib.sha256()
    records: list[Record] = []
    members: dict[str, TarMember] = {}
    seen: set[str] = set()
    for group in _groups(file, location, digest):
        where = f"{location}, {group.key}"
        if group.key in seen:
            group.faults.append("its files do not lie next to each other in the shard")
        seen.add(group.key)
        item = group.record(name, rules.template)
        if group.faults:
            faults.records += 1
            faults.add(where, group.faults[0])
        elif item is not None and (record := parse_record(item, rules, faults, where)) is not None:
            records.append(record)
            members.update({posixpath.normpath(f"{name}/{path}"): member for path, member in group.images})
    return TarShard(digest.hexdigest(), tuple(records), members)


@dataclass(slots=True)
class _Group:
    """Members that belong together."""

    key: str
    texts: dict[str, bytes] = field(default_factory=dict)
    images: list[tuple[str, TarMember]] = field(default_factory=list)
    """Images by name."""
    others: list[str] = field(default_factory=list)
    """Names of what is neither."""
    faults: list[str] = field(default_factory=list)

    def record(self, shard: str, template: Template) -> Any:
        """The JSON value of its record; None if it holds none."""
        item = self._document() if "json" in self.texts else None
        talks = isinstance(item, dict) and item.get("conversations") is not None
        if not talks and "txt" in self.texts and self.images:
            return self._caption(shard, template)
        if item is None and self.images:
            self.faults.append("has images, but neither a .json nor a .txt")
        if "txt" in self.texts and "json" not in self.texts:
            beside = f"; beside it lies {', '.join(self.others)}" if self.others else ""
            self.faults.append(f"has a caption, but no image with a known ending{beside}")
        if not isinstance(item, dict):
            return item
        paths = [f"{shard}/{name}" for name in _in_order([name for name, _ in self.images], item.get("image"))]
        return {"id": self.key, **item, "image": paths}

    def _document(self) -> Any:
        try:
            return json.loads(self.texts["json"])
        except (ValueError, RecursionError) as error:
            self.faults.append(f"its .json is not JSON: {error}")
            return None

    def _caption(self, shard: str, template: Template) -> Any:
        if template is not Template.PLAIN:
            self.faults.append(f"holds a caption, which only data.template=plain learns; it is {template}")
        caption = self.texts["txt"].decode("utf-8", errors="surrogateescape").strip()
        turns = [("human", IMAGE_TOKEN * len(self.images)), ("gpt", caption)]
        paths = [f"{shard}/{name}" for name in _in_order([name for name, _ in self.images], None)]
        conversations = [{"from": role, "value": text} for role, text in turns]
        return {"id": self.key, "image": paths, "conversations": conversations}


def _in_order(names: Sequence[str], listed: Any) -> list[str]:
    """Images as the record lists them, if it names each by its last part; else by the numbers in their names."""
    ordered = sorted(names, key=_by_number)
    if not isinstance(listed, list) or len(listed) != len(names):
        return ordered
    by_name = {posixpath.basename(name): name for name in names}
    found = [by_name.get(posixpath.basename(item)) for item in listed if isinstance(item, str)]
    chosen = [name for name in found if name is not None]
    return chosen if sorted(chosen) == sorted(names) else ordered


def _by_number(name: str) -> list[tuple[int, str]]:
    """`KEY.2.jpg` before `KEY.10.jpg`, which writers that sort by name put first."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _groups(file: IO[bytes], location: Location, digest: Any) -> Iterator[_Group]:
    group: _Group | None = None
    for info, text in _members(file, location):
        digest.update(f"{info.name}\0{info.size}\0{info.mtime}\0{info.type!r}\0".encode("utf-8", "surrogateescape"))
        digest.update(text or b"")
        key, kind = _split(info.name)
        if info.isdir():
            continue
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = _Group(key)
        _put(group, info, kind, text, location)
    if group is not None:
        yield group


def _put(group: _Group, info: tarfile.TarInfo, kind: str, text: bytes | None, location: Location) -> None:
    ending = kind.rpartition(".")[2]
    if kind not in _TEXTS and ending not in _IMAGES:
        group.others.append(info.name)
    elif not info.isreg() or info.issparse():
        group.faults.append(f"{info.name} is no plain file (a link, or sparse)")
    elif text is not None:
        group.texts[kind] = text
    elif kind in _TEXTS:
        group.faults.append(f"{info.name} has {info.size} bytes, too many for a record")
    elif any(name == info.name for name, _ in group.images):
        group.faults.append(f"{info.name} is in the shard twice")
    else:
        # The block before the content is the member's header, whatever extended headers come before that.
        first = info.offset_data - tarfile.BLOCKSIZE
        group.images.append((info.name, TarMember(location, first, info.size, info.chksum)))


def _split(name: str) -> tuple[str, str]:
    """WebDataset's key, and what follows its dot, in small letters."""
    folder, base = posixpath.split(name)
    stem, _, kind = base.partition(".")
    return posixpath.join(folder, stem), kind.lower()


def _members(file: IO[bytes], location: Location) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Every member, with its content if it is a text. Raises DataError unless the tar is whole."""
    _refuse_compressed(file, location)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # kept otherwise, for extraction by name
                text = None
                if _split(info.name)[1] in _TEXTS and info.isreg() and info.size <= _MOST_TEXT_BYTES:
                    content = tar.extractfile(info)
                    assert content is not None
                    text = content.read()
                yield info, text
            file.seek(tar.offset)
            end = file.read(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise DataError(f"{location}: not a tar shard, or a damaged one: {error}. Fetch or write it again.") from error
    if end != bytes(tarfile.BLOCKSIZE):
        what = "is cut short" if len(end) < tarfile.BLOCKSIZE else f"is damaged at byte {tar.offset}"
        raise DataError(f"{location}: the shard {what}: a tar ends with an empty block. Fetch or write it again.")


def _refuse_compressed(file: IO[bytes], location: Location) -> None:
    start = file.read(6)
    file.seek(0)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{location}: a tar compressed with {name}. Images are read out of shards at their offsets, which a "
                "compressed one does not allow (they hardly shrink anyway): unpack it, and name the .tar"
            )
