"""What a SentencePiece model file holds, read without protobuf.

The reader that the package `sentencepiece` ships refuses older releases of protobuf, on which other packages insist
that live beside this one, such as lmms-eval's. Of the file only a few fields are needed, and its format is simple: each
field is a number with a kind, and a value of that kind (https://protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
"""Kinds of values."""
_SIZES = {_FIXED_64: 8, _FIXED_32: 4}


class PieceKind(IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelKind(IntEnum):
    """By what rule a text is cut into pieces."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """A token; its number is its place in the model."""

    text: str
    score: float = 0.0
    kind: PieceKind = PieceKind.NORMAL


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """The parts of a model that decide about ids."""

    pieces: tuple[Piece, ...]
    kind: ModelKind
    charsmap: bytes
    """Replacements of characters, in SentencePiece's own form; empty for none."""
    adds_dummy_prefix: bool
    removes_extra_spaces: bool


def read_sentencepiece(content: bytes) -> SentencePieceModel:
    """Read a model.

    Args:
        content: The whole file, which SentencePiece itself has accepted.

    Returns:
        The model.
    """
    pieces = []
    trainer, normalizer = b"", b""
    for number, value in _fields(content):
        if number == 1:
            pieces.append(_piece(_as_bytes(value)))
        elif number == 2:
            trainer += _as_bytes(value)  # parts of one message that come twice count as one
        elif number == 3:
            normalizer += _as_bytes(value)
    rules = dict(_fields(normalizer))
    return SentencePieceModel(
        pieces=tuple(pieces),
        kind=ModelKind(_as_number(dict(_fields(trainer)).get(3, ModelKind.UNIGRAM))),
        charsmap=_as_bytes(rules.get(2, b"")),
        adds_dummy_prefix=bool(rules.get(3, True)),
        removes_extra_spaces=bool(rules.get(4, True)),
    )


def _piece(content: bytes) -> Piece:
    found = dict(_fields(content))
    (score,) = struct.unpack("<f", _as_bytes(found.get(2, bytes(4))))
    return Piece(_as_bytes(found[1]).decode(), score, PieceKind(_as_number(found.get(3, PieceKind.NORMAL))))


def _as_bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes), f"found the number {value} in place of bytes"
    return value


def _as_number(value: int | bytes) -> int:
    assert isinstance(value, int), f"found {len(value)} bytes in place of a number"
    return value


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message in order: their numbers, and whole numbers or bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(content, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(content, at)
        else:
            size = _SIZES[kind]
        yield number, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A whole number of seven bits a byte, the lowest first, and where the next value begins."""
    value, shift = 0, 0
    while True:
        byte = content[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at
