"""What a job reads: the files that `data.records` names, all their records, and where their images lie.

Every record is read and checked before any work starts, and all of them stay in the driver's memory, in 1.6 times the
size of their JSON (measured on records of eight turns); of a file, one block of text is held at a time. The digest of
the inputs goes into the plan's hash.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import IO, Final

from megatron_deepstack.data.images.source import FileAt, TarMember
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.records.record import Faults, Record, RecordRules
from megatron_deepstack.data.records.record_files import read_record_file
from megatron_deepstack.data.records.tar_shards import read_tar_shard
from megatron_deepstack.data.text.conversation import Template
from megatron_deepstack.errors import ConfigError, DataError
from orchestration.preprocess.sources.videos import FramePair, VideoRules, with_frames

_TAR: Final = re.compile(r"\.(tar(\.\w+)?|tgz)$", re.IGNORECASE)
_RANGE: Final = re.compile(r"\{(\d+)\.\.(\d+)\}")
_ADVICE: Final = "Give files of records, JSON or JSON lines, or tar shards (data.records=...)."


@dataclass(frozen=True, slots=True)
class Inputs:
    """Records of a job."""

    files: tuple[str, ...]
    """In the order in which they were read."""
    sha256: str
    """Of the digests of all files."""
    records: tuple[Record, ...]
    members: Mapping[str, TarMember]
    """Images that lie in tar shards, by their path in records."""
    image_folder: Location | None
    """Where all other images are."""
    frames: Mapping[str, FramePair] = field(default_factory=dict)
    """Those of the images of records that are pairs of a video's frames, by the names that records give them now."""


def read_inputs(
    patterns: Sequence[str],
    images: str | None,
    template: Template,
    ignore_keys: Sequence[str] = (),
    watch: Callable[[int], Callable[[IO[bytes]], IO[bytes]]] | None = None,
    videos: VideoRules | None = None,
) -> Inputs:
    """Read and check all records of a job.

    Args:
        patterns: Paths, glob patterns and URLs of files of records, and of tar shards.
        images: Folder or URL of the images that lie in no tar shard, if there is one.
        template: How conversations will be written.
        ignore_keys: Keys of records that are passed over.
        watch: From the number of files, a function that wraps each one to tell of its reading.

        videos: How videos are read; None refuses records that name any.

    Returns:
        The records, and where their images lie.

    Raises:
        DataError: A file is missing or holds no records, or any record is faulty; the first ten are listed.
        ConfigError: Records need an image folder and there is none.
    """
    files = tuple(find_files(patterns))
    folder = None if images is None else Location.parse(images).absolute()
    local = os.path.normpath(folder.local_path()) if folder and folder.is_local else ""
    rules = RecordRules(template, local, frozenset(ignore_keys), videos is not None)
    names = _shard_names(files)
    faults, digests = Faults(), []
    records: list[Record] = []
    members: dict[str, TarMember] = {}
    watched = (lambda file: file) if watch is None else watch(len(files))
    for location in files:
        with _open(location) as opened:
            file = watched(opened)
            if location in names:
                shard = read_tar_shard(file, location.absolute(), names[location], rules, faults)
                members.update(shard.members)
                read, digest = shard.records, f"{names[location]} {shard.sha256}"
            else:
                found = read_record_file(file, str(location), rules, faults)
                read, digest = found.records, found.sha256
        records += read
        digests.append(digest)
    faults.raise_if_any()
    shown = ", ".join(str(location) for location in files[:3]) + (", ..." if len(files) > 3 else "")
    if not records:
        raise DataError(f"{shown}: holds no records; at least one is needed")
    sha256 = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    needed = any(path not in members for record in records for path in _paths_of(record))
    image_folder = _image_folder(folder, shown) if needed else None
    inputs = Inputs(tuple(map(str, files)), sha256, tuple(records), members, image_folder)
    return inputs if videos is None else _with_frames(inputs, videos)


def _paths_of(record: Record) -> Iterator[str]:
    """The paths of a record's images and of its videos' files."""
    yield from record.images
    for video in record.videos:
        yield from video.files


def _with_frames(inputs: Inputs, videos: VideoRules) -> Inputs:
    """The inputs with videos written as images."""

    def file_at(path: str) -> FileAt:
        member = inputs.members.get(path)
        if member is not None:
            return member
        assert inputs.image_folder is not None, path
        return inputs.image_folder.child(path)

    records, frames = with_frames(inputs.records, videos, file_at)
    return replace(inputs, records=records, frames=frames)


def find_files(patterns: Sequence[str]) -> Iterator[Location]:
    """Every file that the patterns name, once: patterns in the order given, the files of each sorted.

    Raises DataError for a pattern that no file matches.
    """
    seen = set()
    for pattern in (each for given in patterns for each in _expand_range(given)):
        for location in _matches(pattern):
            path = os.path.abspath(location.local_path()) if location.is_local else str(location)
            if path not in seen:
                seen.add(path)
                yield location


def _expand_range(pattern: str) -> Iterator[str]:
    """WebDataset's `{000..012}`, each number in turn; only the first, and then the rest, as they stand."""
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    if int(first) > int(last):
        raise DataError(f"{pattern}: {found.group()} counts down; write the smaller number first")
    for number in range(int(first), int(last) + 1):
        yield from _expand_range(f"{pattern[: found.start()]}{number:0{len(first)}d}{pattern[found.end() :]}")


def _matches(pattern: str) -> Sequence[Location]:
    location = Location.parse(pattern)
    if not glob.has_magic(pattern) or (location.is_local and location.exists()):
        return [location]
    before = pattern[: re.search(r"[*?[]", pattern).start()]  # type: ignore[union-attr]
    folder = before[: before.rfind("/") + 1]
    found = Location.parse(folder or ".").list(pattern[len(folder) :])
    if not found:
        raise DataError(f"{pattern}: no file matches{location.looked_in} (data.records=...)")
    return found if folder else [Location.parse(os.path.normpath(str(item))) for item in found]


def _open(location: Location) -> IO[bytes]:
    try:
        return location.open_read()
    except OSError as error:
        reason = f"{error.strerror or error}{location.looked_in}"
        raise DataError(f"{location}: the records cannot be read: {reason}. {_ADVICE}") from error


def _shard_names(files: Sequence[Location]) -> dict[Location, str]:
    """Names of tar shards in image paths: what is left of their own paths below the folder that they share."""
    shards = [location for location in files if _TAR.search(location.name)]
    parts = [str(shard.absolute()).replace("://", "/").split("/") for shard in shards]
    shared = len([*takewhile(lambda names: len(set(names)) == 1, zip(*(part[:-1] for part in parts), strict=False))])
    return {shard: "/".join(part[shared:]).lstrip("/") for shard, part in zip(shards, parts, strict=True)}


def _image_folder(folder: Location | None, shown: str) -> Location:
    if folder is None:
        raise ConfigError(
            [
                "data.images is not set: give the folder or URL that the image paths in "
                f"{shown} are relative to, in the recipe or as data.images=... behind it"
            ]
        )
    if folder.is_local and not folder.is_folder():
        raise DataError(f"{folder}: no such image folder (data.images=...)")
    return folder
