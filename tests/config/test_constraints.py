"""Constraints beside fields: which values they hold, how they say it, and that each is found where it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import pytest

from megatron_deepstack.config.choices import Part
from megatron_deepstack.config.constraints import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    Matches,
    NotBlank,
    PathKind,
    Range,
    Unit,
)
from megatron_deepstack.config.fields import Field, FieldType, leaves, members

RANGES = {
    "positive": (POSITIVE, "a number above 0", (1e-9, 1, math.inf), (0, -1, math.nan)),
    "not negative": (NOT_NEGATIVE, "0 or more", (0, 0.5), (-1e-9, math.nan)),
    "share": (SHARE, "a number from 0 to 1", (0, 1), (-0.1, 1.1)),
    "below one": (BELOW_ONE, "a number from 0 to below 1", (0, 0.999), (1, -1)),
    "seed": (SEED, "a number from 0 to 2147483647", (0, 2**31 - 1), (-1, 2**31)),
    "both ends open": (Range(above=0, below=2), "a number above 0 to below 2", (1,), (0, 2)),
}


@pytest.mark.parametrize(("allowed", "words", "good", "bad"), RANGES.values(), ids=RANGES)
def test_ranges(allowed: Range, words: str, good: tuple[float, ...], bad: tuple[float, ...]) -> None:
    assert str(allowed) == words
    assert all(map(allowed.holds, good))
    assert not any(map(allowed.holds, bad))


def test_the_form_of_a_text() -> None:
    colour = Matches("none|#[0-9a-f]{6}", "none, or a colour")
    assert colour.holds("none")
    assert colour.holds("#00ff00")
    assert not colour.holds("#00ff0")
    assert not colour.holds("none of them")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    size: Annotated[int, POSITIVE, Unit("bytes")] = 1
    places: tuple[Annotated[str, PathKind.PATTERN], ...] | None = None
    pair: tuple[Annotated[float, SHARE], Annotated[float, SHARE]] = (0.0, 1.0)
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    title: Annotated[str, NotBlank(), Matches("a+", "a row of a")] = "a"
    inner: Inner = Inner()
    flag: bool | None = None


def test_what_stands_beside_a_field_is_found() -> None:
    assert members(Outer)["inner"] is Inner
    assert leaves(Outer) == (
        Field(
            path="title",
            type=FieldType(item=str, not_blank=True, form=Matches("a+", "a row of a")),
            default="a",
        ),
        Field(path="inner.size", type=FieldType(item=int, range=POSITIVE, unit="bytes"), default=1),
        Field(
            path="inner.places",
            type=FieldType(item=str, optional=True, many=True, path=PathKind.PATTERN),
            default=None,
        ),
        Field(
            path="inner.pair",
            type=FieldType(item=float, many=True, length=2, range=SHARE),
            default=(0.0, 1.0),
        ),
        Field(path="inner.parts", type=FieldType(item=Part, many=True), default=()),
        Field(path="flag", type=FieldType(item=bool, optional=True), default=None),
    )
