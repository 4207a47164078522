"""JSON files of records, read as a stream: a list of values, or one value after another as in JSON lines.

Gzip is recognised by its first bytes. Only one block of text and one record are held at a time, whatever the file's
size. The file's sha256 is computed in the same pass.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import posixpath
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Final

from megatron_deepstack.data.file_kind import START_BYTES, what_file_is
from megatron_deepstack.data.records.keys import as_object
from megatron_deepstack.data.records.record import Faults, Record, RecordRules, parse_record
from megatron_deepstack.errors import DataError

_BLOCK_CHARS: Final = 1 << 20
"""Text read at a time."""
_BUFFER_BYTES: Final = 1 << 20
_MOST_CHARS: Final = 1 << 28
"""Length of the longest record; a file with a longer value is no file of records."""
_NEAR_THE_END: Final = 16
"""An error so close to the end of the text read so far may mean that the value continues in the next block."""
_GZIP_MAGIC: Final = b"\x1f\x8b"
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_FORM: Final = "A records file is a JSON list, or one object per line."


@dataclass(frozen=True, slots=True)
class RecordFile:
    """The records of a file."""

    sha256: str
    """The hash of the file's bytes, still compressed if the file is."""
    records: tuple[Record, ...]


def read_record_file(file: IO[bytes], path: str, rules: RecordRules, faults: Faults) -> RecordFile:
    """Read and check all records of an open file.

    Args:
        file: The file, at its beginning.
        path: Its name in messages.
        rules: What each record is checked against.
        faults: Receives the faulty records.

    Returns:
        The usable records and the file's hash.

    Raises:
        DataError: The file is not JSON, or cannot be unpacked.
    """
    source = _HashedFile(file)
    records = []
    for number, (line, item) in enumerate(_read_values(source, path)):
        where, numbered = f"{path}, record {number} at line {line}", f"{posixpath.basename(path)}:{number}"
        parsed = parse_record(item, rules, faults, where, numbered)
        if parsed is not None:
            records.append(parsed)
    return RecordFile(source.hexdigest(), tuple(records))


def _read_values(source: _HashedFile, path: str) -> Iterator[tuple[int, Any]]:
    """Every value with the line it begins at, from 1. Errors of JSON and gzip become DataErrors."""
    scanner = None
    try:
        scanner = _Scanner(_as_text(source, path))
        yield from _list_items(scanner) if scanner.peek() == "[" else _loose_values(scanner)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    except RecursionError as error:
        raise DataError(f"{path}: not a list of records: it is nested too deeply") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked: {error}. Fetch or compress it again.") from error
    except ValueError as error:  # a JSONDecodeError, or for example a number of 5000 digits
        line = scanner.line if scanner else 1
        raise DataError(f"{path}, line {line}: not JSON: {error}. {_FORM}") from error


def _as_text(source: _HashedFile, path: str) -> io.TextIOWrapper:
    raw: Any = io.BufferedReader(source, _BUFFER_BYTES)
    start = raw.peek(START_BYTES)[:START_BYTES]
    if start[:2] == _GZIP_MAGIC:
        raw = gzip.GzipFile(fileobj=raw)
    elif start and (what := what_file_is(start)):
        raise DataError(f"{path}: not a file of records: it is {what}. {_FORM}")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n")


def _list_items(scanner: _Scanner) -> Iterator[tuple[int, Any]]:
    scanner.skip("[")
    while scanner.peek() != "]":
        yield scanner.line, scanner.value()
        if scanner.peek() != "]":
            scanner.skip(",")
            if scanner.peek() == "]":
                raise ValueError("a comma before the end of the list")
    scanner.skip("]")
    if scanner.peek():
        raise ValueError("something follows the list")


def _loose_values(scanner: _Scanner) -> Iterator[tuple[int, Any]]:
    while scanner.peek():
        yield scanner.line, scanner.value()


class _HashedFile(io.RawIOBase):
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._hash.update(data)
        return len(data)

    def hexdigest(self) -> str:
        """The sha256 of the whole file; this reads what is left of it."""
        while self.read(_BUFFER_BYTES):
            pass
        return self._hash.hexdigest()


class _Scanner:
    """Values of a stream of text, one after the other."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self._decoder = json.JSONDecoder(object_pairs_hook=as_object)
        self._buffer = ""
        self._at = 0
        self.line = 1
        """Line of the next character, 1-based."""

    def peek(self) -> str:
        """The next character that is not a space; empty at the end."""
        while True:
            space = _SPACE.match(self._buffer, self._at)
            assert space is not None
            self._advance(space.end())
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def skip(self, character: str) -> None:
        """Skip `character`, which must come next."""
        found = self.peek()
        if found != character:
            raise ValueError(f"{character!r} expected, found {found!r}" if found else "the list has no end")
        self._advance(self._at + 1)

    def value(self) -> Any:
        """The value that comes next. Raises ValueError if there is none."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                whole = error.pos < len(self._buffer) - _NEAR_THE_END and not error.msg.startswith("Unterminated")
                if whole or not self._more():
                    raise ValueError(f"{error.msg}, {error.pos - self._at} characters into the value") from error
            else:
                if end < len(self._buffer) or not self._more():
                    self._advance(end)
                    return value

    def _advance(self, end: int) -> None:
        self.line += self._buffer.count("\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        """Read on; False at the end of the text.

        The block grows with the value, so that the total work for a long value stays small.
        """
        rest = len(self._buffer) - self._at
        if rest > _MOST_CHARS:
            raise ValueError(f"the value is longer than {_MOST_CHARS} characters")
        block = self._text.read(max(_BLOCK_CHARS, rest))
        if block:
            self._buffer = self._buffer[self._at :] + block
            self._at = 0
        return bool(block)
