"""A problem found in a recipe, and how several of them become one error.

Every check collects problems instead of raising at the first, so that a user sees all of them at once. Each problem
names its fields, so that a rule about a field that could not be read is not reported as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from megatron_deepstack.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong, in words, with the fields it concerns."""

    paths: tuple[str, ...]
    """Dotted paths of the fields involved; the first one is named at the start of the message."""
    text: str
    """What was found, what was expected and what to do."""
    kind: type[ConfigError] = ConfigError
    """Class of the error that is raised if all problems are of this kind."""

    def __str__(self) -> str:
        return f"{self.paths[0]}: {self.text}" if self.paths and self.paths[0] else self.text

    def concerns(self, path: str) -> bool:
        """Whether the problem names the field at `path`, a section around it, or a field inside it."""
        return any(path == own or path.startswith(f"{own}.") or own.startswith(f"{path}.") for own in self.paths)


def without_echoes(found: Sequence[Problem], unread: Sequence[Problem]) -> list[Problem]:
    """Leave out problems of fields that are already reported.

    Args:
        found: Problems that rules found.
        unread: Problems of fields that could not be read.

    Returns:
        The problems of `found` that concern no field of `unread`.
    """
    bad = [problem.paths[0] for problem in unread if problem.paths]
    return [problem for problem in found if not any(problem.concerns(path) for path in bad)]


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise one error for all problems, or return if there are none.

    Args:
        problems: The problems.

    Raises:
        ConfigError: There is a problem. If all problems are of one subclass, that class is raised.
    """
    if not problems:
        return
    kinds = {problem.kind for problem in problems}
    kind = kinds.pop() if len(kinds) == 1 else ConfigError
    raise kind([str(problem) for problem in problems])


def did_you_mean(word: str, names: Sequence[str]) -> str:
    """Suggest a name in place of a mistyped word.

    Args:
        word: What was written.
        names: The known names.

    Returns:
        `; did you mean 'x'?` with the nearest name, or an empty text if no name is near.
    """
    near = get_close_matches(word.lower().replace("-", "_"), names, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
