"""WebDataset tar shards: records and captions are read; of images only the offset is noted, to read them later.

Members that follow each other and share a name up to its first dot belong together: KEY.json is a record (its id is KEY
if it has none), and its images are KEY.jpg, or KEY.0.jpg, KEY.1.jpg, ... A KEY.txt beside an image, without a
conversation, is a caption. If all names have dots of their own (photo.v2.jpg, photo.v2.json), each text takes the
images that begin with its whole name; if this is not clear, the error names the members. Files that macOS adds
(`._NAME`, `.DS_Store`, `__MACOSX/`) are left out, as WebDataset leaves out names that begin with a dot. Images are
never unpacked, so a shard must not be compressed. A shard's digest covers names, sizes and times of all members and the
content of its texts; it does not cover pixels, like the digest of a folder.
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

from megatron_deepstack.data.file_kind import START_BYTES, what_file_is
from megatron_deepstack.data.images.source import TarMember
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.records.dialects import holds_talk, named_images
from megatron_deepstack.data.records.keys import as_object
from megatron_deepstack.data.records.record import Faults, Record, RecordRules, parse_record
from megatron_deepstack.data.text.conversation import Template
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN

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
_LEFT_OUT: Final = re.compile(
    r"(^|/)(\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini|__MACOSX(/.*)?|PaxHeaders?(\.[^/]*)?(/.*)?)$", re.IGNORECASE
)
"""Members that operating systems add: resource forks, folder settings, extended headers unpacked as files."""
_SHOWN_MEMBERS: Final = 6
_MOST_TEXT_BYTES: Final = 1 << 28
"""Size of the largest record; a larger text is no record."""
_COMPRESSED: Final = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class TarShard:
    """What a shard holds."""

    sha256: str
    """The hash of the names, sizes and times of its members, and of its texts."""
    records: tuple[Record, ...]
    members: dict[str, TarMember]
    """Its images by the path that its records give."""


def read_tar_shard(file: IO[bytes], location: Location, name: str, rules: RecordRules, faults: Faults) -> TarShard:
    """Read and check all records of an open shard.

    Args:
        file: The shard, at its beginning.
        location: Where it is.
        name: Images get the path `name`/MEMBER.
        rules: What each record is checked against.
        faults: Receives the faulty records.

    Returns:
        The usable records, their images and the shard's digest.

    Raises:
        DataError: The file is no tar, is compressed, or ends too soon.
    """
    digest = hashlib.sha256()
    records: list[Record] = []
    members: dict[str, TarMember] = {}
    seen: set[str] = set()
    for group in (part for whole in _groups(file, location, digest) for part in whole.by_whole_names()):
        where = f"{location}, {group.key}"
        if group.key in seen:
            group.faults.append("its files do not lie next to each other in the shard")
        seen.add(group.key)
        item = group.record(rules.template)
        if group.faults:
            faults.records += 1
            faults.add(where, group.faults[0])
        elif item is not None:
            paths = [f"{name}/{path}" for path in group.image_names(item)]
            record = parse_record(item, rules, faults, where, group.key, paths)
            if record is not None:
                records.append(record)
                members.update({posixpath.normpath(f"{name}/{path}"): member for path, member in group.images})
    return TarShard(digest.hexdigest(), tuple(records), members)


@dataclass(slots=True)
class _Group:
    """Members that belong together."""

    key: str
    texts: dict[str, bytes] = field(default_factory=dict)
    """Contents by kind: `json`, `txt`, or with a dotted name before it, as in `v2.json`."""
    images: list[tuple[str, TarMember]] = field(default_factory=list)
    """Images by name."""
    others: list[str] = field(default_factory=list)
    """Names of what is neither."""
    faults: list[str] = field(default_factory=list)

    def by_whole_names(self) -> list[_Group]:
        """The group itself; or, if its members' names contain dots, one group for each text with its images."""
        dotted = [kind for kind in self.texts if "." in kind]
        if not dotted:
            return [self]
        if self.texts.keys() & _TEXTS:
            if clash := [kind for kind in dotted if self._is_record(kind)]:
                self._cut(f"both {self.key}.{clash[0]} and another text lie beside it")
            self.others += [f"{self.key}.{kind}" for kind in dotted]
            self.texts = {kind: text for kind, text in self.texts.items() if kind in _TEXTS}
            return [self]
        stems = {f"{self.key}.{kind.rpartition('.')[0]}" for kind in dotted}
        parts = {stem: _Group(stem, faults=list(self.faults)) for stem in sorted(stems)}
        for kind in dotted:
            stem, _, ending = kind.rpartition(".")
            parts[f"{self.key}.{stem}"].texts[ending] = self.texts[kind]
        for name, member in self.images:
            owners = [stem for stem in stems if name.startswith(f"{stem}.")]
            if not owners:
                self._cut(f"{name} has the name of none of its texts")
                return [self]
            parts[max(owners, key=len)].images.append((name, member))
        return list(parts.values())

    def image_names(self, item: Any) -> list[str]:
        """Names of its images in the order of their placeholders."""
        return _in_order([name for name, _ in self.images], named_images(item) if isinstance(item, dict) else [])

    def _is_record(self, kind: str) -> bool:
        """Whether a text with a dotted name is a record, or is the caption of an image that has its name."""
        stem, _, ending = kind.rpartition(".")
        if any(name.startswith(f"{self.key}.{stem}.") for name, _ in self.images):
            return True
        try:
            return ending == "json" and holds_talk(json.loads(self.texts[kind]))
        except (ValueError, RecursionError):
            return False

    def _cut(self, what: str) -> None:
        names = [*(f"{self.key}.{kind}" for kind in self.texts), *(name for name, _ in self.images)]
        more = f", ... ({len(names)} members)" if len(names) > _SHOWN_MEMBERS else ""
        self.faults.append(
            f"names are cut at their first dot, so these are one sample: {', '.join(names[:_SHOWN_MEMBERS])}{more}; "
            f"{what}. Write names with one dot, or one text for each image with the same name"
        )

    def record(self, template: Template) -> Any:
        """The JSON value of its record; None if it holds none."""
        item = self._document() if "json" in self.texts else None
        if not holds_talk(item) and "txt" in self.texts and self.images:
            return self._caption(template)
        if item is None and self.images and not self.faults:
            shown = ", ".join([*(name for name, _ in self.images), *self.others][:_SHOWN_MEMBERS])
            self.faults.append(f"has images, but neither a .json nor a .txt; names are cut at their first dot: {shown}")
        if "txt" in self.texts and "json" not in self.texts:
            beside = f"; beside it lies {', '.join(self.others)}" if self.others else ""
            self.faults.append(f"has a caption, but no image with a known ending{beside}")
        return item

    def _document(self) -> Any:
        try:
            return json.loads(self.texts["json"], object_pairs_hook=as_object)
        except (ValueError, RecursionError) as error:
            self.faults.append(f"its .json is not JSON: {error}")
            return None

    def _caption(self, template: Template) -> Any:
        if template is not Template.PLAIN:
            self.faults.append(f"holds a caption, which only data.template=plain learns; it is {template}")
        caption = self.texts["txt"].decode("utf-8", errors="surrogateescape").strip()
        turns = [("human", IMAGE_TOKEN * len(self.images)), ("gpt", caption)]
        return {"id": self.key, "conversations": [{"from": role, "value": text} for role, text in turns]}


def _in_order(names: Sequence[str], listed: Sequence[str]) -> list[str]:
    """Images in the record's order, if it names each by its last part; otherwise by the numbers in their names."""
    ordered = sorted(names, key=_by_number)
    if len(listed) != len(names):
        return ordered
    by_name = {posixpath.basename(name): name for name in names}
    found = [by_name.get(posixpath.basename(item)) for item in listed]
    chosen = [name for name in found if name is not None]
    return chosen if sorted(chosen) == sorted(names) else ordered


def _by_number(name: str) -> list[tuple[int, str]]:
    """A sort key that puts `KEY.2.jpg` before `KEY.10.jpg`; writers that sort by name put them the other way round."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _groups(file: IO[bytes], location: Location, digest: Any) -> Iterator[_Group]:
    group: _Group | None = None
    for info, text in _members(file, location):
        digest.update(f"{info.name}\0{info.size}\0{info.mtime}\0{info.type!r}\0".encode("utf-8", "surrogateescape"))
        digest.update(text or b"")
        key, kind = _split(info.name)
        if info.isdir() or _LEFT_OUT.search(info.name):
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
    if ending not in _TEXTS and ending not in _IMAGES:
        group.others.append(info.name)
    elif not posixpath.basename(group.key):
        group.faults.append(f"{info.name} begins with a dot, which no sample's name does; rename it")
    elif not info.isreg() or info.issparse():
        group.faults.append(f"{info.name} is no plain file (a link, or sparse)")
    elif text is not None:
        group.texts[kind] = text
    elif ending in _TEXTS:
        group.faults.append(f"{info.name} has {info.size} bytes, too many for a record")
    elif any(name == info.name for name, _ in group.images):
        group.faults.append(f"{info.name} is in the shard twice")
    else:
        # The block before the content is the member's header; extended headers come before that block.
        first = info.offset_data - tarfile.BLOCKSIZE
        group.images.append((info.name, TarMember(location, first, info.size, info.chksum)))


def _split(name: str) -> tuple[str, str]:
    """WebDataset's key, and what follows its dot, in lower case."""
    folder, base = posixpath.split(name)
    stem, _, kind = base.partition(".")
    return posixpath.join(folder, stem), kind.lower()


def _is_text(info: tarfile.TarInfo) -> bool:
    return _split(info.name)[1].rpartition(".")[2] in _TEXTS and not _LEFT_OUT.search(info.name)


def _members(file: IO[bytes], location: Location) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Every member, with its content if it is a text. Raises DataError if the tar is not whole."""
    _refuse_compressed(file, location)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # otherwise tar keeps every member in memory
                text = None
                if _is_text(info) and info.isreg() and info.size <= _MOST_TEXT_BYTES:
                    content = tar.extractfile(info)
                    assert content is not None
                    text = content.read()
                yield info, text
            file.seek(tar.offset)
            end = file.read(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        file.seek(0)
        what = what_file_is(file.read(START_BYTES))
        reason = f"it is {what}" if what else f"{error}. Fetch or write it again"
        raise DataError(f"{location}: not a tar shard, or a damaged one: {reason}.") from error
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
