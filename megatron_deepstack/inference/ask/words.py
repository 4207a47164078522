"""The words after `ask RUN`: pictures, then the question, and changes to the recipe anywhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Final

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.location import Location
from megatron_deepstack.errors import ConfigError

_SECTIONS: Final = "|".join(field.name for field in fields(Recipe))
_OVERRIDE: Final = re.compile(rf"({_SECTIONS})(\.\w+)+=.*", re.DOTALL)
_LOOKS_LIKE_A_PICTURE: Final = re.compile(
    r"\S+\.(jpe?g|png|webp|gif|bmp|tiff?|jp2|heic|avif|ppm)|\w[\w+.-]*://\S+", re.IGNORECASE
)


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
    return bool(_LOOKS_LIKE_A_PICTURE.fullmatch(word)) or (len(word) < 4096 and "\n" not in word and exists(word))
