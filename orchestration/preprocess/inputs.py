"""What a job reads: the files that `data.records` names, all their records, and where their images lie.

Every record is read and checked before any work starts, and all of them stay in the driver's memory; of a file, one
block of text is held at a time. The digest of the inputs' bytes goes into the plan's hash.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_deepstack.data.conversation import Template
from megatron_deepstack.data.record_files import read_record_file
from megatron_deepstack.data.records import Faults, Record, RecordRules
from megatron_deepstack.errors import DataError


@dataclass(frozen=True, slots=True)
class Inputs:
    """Records of a job."""

    files: tuple[str, ...]
    """In the order in which they were read."""
    sha256: str
    """Of the digests of all files."""
    records: tuple[Record, ...]


def read_inputs(patterns: Sequence[str], images: str | None, template: Template) -> Inputs:
    """Read and check all records of the files that `patterns` name; `images` is the image folder, if there is one.

    Raises DataError if a file is missing or no records file, or if any record is faulty: the first ten are listed.
    """
    files = tuple(find_files(patterns))
    rules = RecordRules(template, os.path.abspath(images) if images else "")
    faults, digests = Faults(), []
    records: list[Record] = []
    for path in files:
        try:
            with open(path, "rb") as file:
                read = read_record_file(file, path, rules, faults)
        except OSError as error:
            raise DataError(
                f"{path}: the records cannot be read: {error.strerror or error}. Give a LLaVA-style JSON file "
                "(data.records, or --records)."
            ) from error
        digests.append(read.sha256)
        records += read.records
    faults.raise_if_any()
    if not records:
        raise DataError(f"{', '.join(files)}: holds no records; at least one is needed")
    return Inputs(files, hashlib.sha256("\n".join(digests).encode()).hexdigest(), tuple(records))


def find_files(patterns: Sequence[str]) -> Iterator[str]:
    """Every file that the patterns name, once: patterns in the order given, the files of each sorted."""
    seen = set()
    for pattern in patterns:
        for path in _matches(pattern):
            if path not in seen:
                seen.add(path)
                yield path


def _matches(pattern: str) -> Sequence[str]:
    if not glob.has_magic(pattern) or Path(pattern).exists():
        return [pattern]
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise DataError(f"{pattern}: no file matches (data.records, or --records)")
    return found
