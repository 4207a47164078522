"""One line of what `doctor` says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How good it is."""

    GOOD = "good"
    NOTE = "note"
    """Works, but something is slower or absent that some runs need."""
    LACKING = "lacking"
    """Training cannot run without it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about one subject."""

    subject: str
    state: State
    found: str
    advice: str = ""
    """What to do; empty where nothing is to be done."""
