"""Paths given on the command line: a leading `~` means the home folder, for every parameter of every verb.

A shell expands `~/x`, but not `--store=~/x` or quoted words, which would create a folder called `~`. A parameter is a
path if its type is Path, or if it is annotated with a PathKind, for texts that may also be URLs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from megatron_deepstack.config.constraints import PathError, PathKind, expand_home
from megatron_deepstack.errors import ConfigError


def expand_homes(application: typer.Typer) -> None:
    """Expand `~` in the paths of all verbs registered so far, including those in groups."""
    for verb in application.registered_commands:
        if verb.callback is not None:
            verb.callback = _with_homes(verb.callback)
    for group in application.registered_groups:
        if group.typer_instance is not None:
            expand_homes(group.typer_instance)


def path_parameters(verb: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a verb's parameters that are paths."""
    hints = get_type_hints(verb, include_extras=True)
    return tuple(name for name, hint in hints.items() if name != "return" and _is_path(hint))


def _is_path(hint: Any) -> bool:
    """Whether an annotation contains a Path, or a text marked as one, as in `list[Path] | None`."""
    if hint is Path or isinstance(hint, PathKind):
        return True
    inner = (*get_args(hint), *hint.__metadata__) if get_origin(hint) is Annotated else get_args(hint)
    return any(_is_path(part) for part in inner)


def _with_homes(verb: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(verb)
    def run(**values: Any) -> Any:
        for name in path_parameters(verb):
            values[name] = _expanded(name, values[name])
        return verb(**values)

    return run


def _expanded(name: str, value: Any) -> Any:
    """A path, a text, or a list of them, with `~` expanded; anything else (None) is returned unchanged."""
    if isinstance(value, list):
        return [_expanded(name, item) for item in value]
    if not isinstance(value, (str, Path)):
        return value
    try:
        return type(value)(expand_home(str(value)))
    except PathError as error:
        raise ConfigError([f"{name.replace('_', '-')}: found '{value}', expected {error}"]) from error
