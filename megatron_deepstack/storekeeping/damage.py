"""A fault found in a store, and what can be done about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

RESTORE: Final = "restore the file from a copy, or preprocess into a new folder: the same inputs give the same bytes"
REMAKE: Final = "preprocess into a new folder"
_LISTED: Final = 10
"""The number of rows that are named if many have the same fault."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One fault."""

    where: str
    """File of the store, or array."""
    what: str
    """What was found, and what was expected."""
    advice: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.advice}"


def rows(numbers: np.ndarray, noun: str) -> str:
    """Numbers as a phrase, such as `samples 3, 7, 9, ... (120 in all)`.

    Args:
        numbers: Integers (N,), at least one.
        noun: What they number, in the singular.

    Returns:
        The phrase with the first few of them.
    """
    listed = ", ".join(str(number) for number in numbers[:_LISTED].tolist())
    more = f", ... ({len(numbers)} in all)" if len(numbers) > _LISTED else ""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {listed}{more}"
