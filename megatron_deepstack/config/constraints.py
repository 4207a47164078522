"""What a single field may hold beyond its type: a range, a unit, whether it is a path.

A constraint is written in the field's annotation, as `Annotated[int, POSITIVE, Unit("pixels")]` in `schema`. `fields`
reads it from there for all users: building a recipe, checking it, the options page and the JSON schema for editors.
Rules between fields are in `check`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.:-]+)*://")
_FILE_URL: Final = "file://"
_SHELL_VARIABLE: Final = re.compile(r"\$(\w+)(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """The numbers that a field may hold. None means no limit. The range of a list applies to each of its items."""

    least: float | None = None
    """Smallest value allowed."""
    above: float | None = None
    """The value must be larger than this."""
    most: float | None = None
    """Largest value allowed."""
    below: float | None = None
    """The value must be smaller than this."""

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range; NaN lies in no range."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.most is None and self.below is None:
            return f"{self.least:.15g} or more" if self.least is not None else f"a number above {self.above:.15g}"
        low = f"from {self.least:.15g}" if self.least is not None else f"above {self.above:.15g}"
        high = f"to {self.most:.15g}" if self.most is not None else f"to below {self.below:.15g}"
        return f"a number {low} {high}"


POSITIVE: Final = Range(above=0)
NOT_NEGATIVE: Final = Range(least=0)
AT_LEAST_ONE: Final = Range(least=1)
SHARE: Final = Range(least=0, most=1)
BELOW_ONE: Final = Range(least=0, below=1)
SEED: Final = Range(least=0, most=2**31 - 1)


@dataclass(frozen=True, slots=True)
class Unit:
    """What a number counts or measures."""

    name: str
    """The unit in the plural, such as `tokens` or `seconds`."""


@dataclass(frozen=True, slots=True)
class NotBlank:
    """A text that must hold more than white space."""


@dataclass(frozen=True, slots=True)
class Matches:
    """A text of a certain form."""

    pattern: str
    """Regular expression that the whole text must match."""
    words: str
    """The form in words, to follow `expected`."""

    def holds(self, text: str) -> bool:
        """Whether `text` has the form."""
        return re.fullmatch(self.pattern, text) is not None


class PathKind(StrEnum):
    """What a text that is a path may name; the value says it in words."""

    LOCAL = "path"
    LOCATION = "path or URL"
    PATTERN = "path, URL or glob pattern"


class PathError(ValueError):
    """A path cannot have the meaning that its writer intended; the message says what to write."""


def expand_home(text: str) -> str:
    """Replace a leading `~` or `~user` of a path by the home folder, as a shell does. A URL is not changed.

    Args:
        text: A path, a glob pattern, or a URL. `file://` URLs are paths, all others are not touched.

    Returns:
        The path that is meant; `text` itself where it begins with no `~`.

    Raises:
        PathError: The user is unknown, or the path begins with a shell variable, which no shell replaces here. Without
            this error a folder with that literal name would be created.
    """
    if text.startswith(_FILE_URL):
        return _FILE_URL + expand_home(text.removeprefix(_FILE_URL))
    if _URL.match(text):
        return text
    variable = _SHELL_VARIABLE.match(text)
    if variable:
        name, rest = variable.groups()
        raise PathError(
            f"a path; shell variables are not replaced here: write it out, or ${{oc.env:{name}}}{rest} in a recipe, or "
            f"./{text} for a folder of that very name"
        )
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded == text:
        user = text[1:].partition("/")[0]
        who = f"the user '{user}'" if user else "the present user, and HOME is not set"
        raise PathError(f"a path; no home folder is known of {who}: write it out, or ./{text} for a folder so named")
    return expanded
