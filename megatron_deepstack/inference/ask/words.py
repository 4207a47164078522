"""The words after `ask RUN`: pictures, then the question, and changes to the recipe anywhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Final

from megatron_deepstack.config.constraints import PathError, expand_home
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.location import Location
from megatron_deepstack.errors import ConfigError

_SECTIONS: Final = "|".join(field.name for field in fields(Recipe))
_OVERRIDE: Final = re.compile(rf"({_SECTIONS})(\.\w+)+=.*", re.DOTALL)
_LOOKS_LIKE_A_PICTURE: Final = re.compile(
    r"\S+\.(jpe?g|png|webp|gif|bmp|tiff?|jp2|heic|avif|ppm)|\w[\w+.-]*://\S+", re.IGNORECASE
)

_LONGEST_PATH: Final = 4096


@dataclass(frozen=True, slots=True)
class Words:
    """What the words mean."""

    overrides: tuple[str, ...]
    pictures: tuple[str, ...]
    question: str | None
    """None asks for a chat."""


def understand(
    words: Sequence[str],
    question: str | None,
    exists: Callable[[str], bool] = lambda path: Location.parse(path).exists(),
) -> Words:
    """Tell pictures, question and overrides apart.

    A word like `section.field=value` is an override. The last other word is the question, unless it is a file that is
    there or looks like a picture's name; all others are pictures.

    Args:
        words: The words.
        question: The question, if an option gave it; then no word is one.
        exists: Whether a file or an object is there.

    Returns:
        What they mean.

    Raises:
        ConfigError: A picture is not there.
    """
    overrides = tuple(word for word in words if _OVERRIDE.fullmatch(word))
    pictures = [word for word in words if not _OVERRIDE.fullmatch(word)]
    if question is None and pictures and not _is_picture(pictures[-1], exists):
        question = pictures.pop()
    pictures = [_with_home(picture) for picture in pictures]
    missing = [picture for picture in pictures if not exists(picture)]
    if missing:
        raise ConfigError(
            [
                f"{picture}: no such picture; the words after the run are pictures, and last the question in quotes"
                for picture in missing
            ]
        )
    return Words(overrides, tuple(pictures), question)


def _is_picture(word: str, exists: Callable[[str], bool]) -> bool:
    if _LOOKS_LIKE_A_PICTURE.fullmatch(word):
        return True
    if not word or len(word) >= _LONGEST_PATH or "\n" in word or word.startswith("$"):
        return False
    with suppress(PathError):
        return exists(expand_home(word))
    return False


def _with_home(picture: str) -> str:
    """The path with `~` as the home folder. A question may begin so as well, so this cannot be done for every word."""
    try:
        return expand_home(picture)
    except PathError as error:
        raise ConfigError([f"found {picture!r}, expected {error}"]) from error
