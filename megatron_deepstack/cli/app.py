"""The command line: one thin verb per step of a run.

Nothing heavy is imported before a verb knows that its input makes sense, so that `--help`, a typo and a bad value
answer at once. Expected failures print their message and leave with the exit code of their class; `--debug` shows
the traceback as well.
"""

from __future__ import annotations

import os
import traceback
import warnings
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from megatron_deepstack import __version__
from megatron_deepstack.config.constraints import PathKind
from megatron_deepstack.errors import ConfigError, DeepStackError


class Verbs(TyperGroup):
    """A group of verbs; turns expected failures into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DeepStackError as error:
            if ctx.find_root().params.get("debug"):
                traceback.print_exception(error)
            _fail(error)


def _fail(error: DeepStackError) -> NoReturn:
    """Say what is wrong, once: under torchrun every rank comes here, but for what one of them met alone."""
    if error.rank is None and os.environ.get("RANK", "0") != "0":
        raise typer.Exit(error.exit_code)
    console = Console(stderr=True)
    lines = error.problems if isinstance(error, ConfigError) else (str(error),)
    title = f"{len(lines)} problems" if len(lines) > 1 else "error"
    console.print(Text(title, style="bold red"))
    for line in lines:
        console.print(Text(f"  {line}"), soft_wrap=True)
    raise typer.Exit(error.exit_code)


app = typer.Typer(
    name="megatron-deepstack",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train DeepStack multimodal language models: images and JSON in, checkpoint and answers out.",
)

RecipeArgument = Annotated[
    str, PathKind.LOCAL, typer.Argument(metavar="RECIPE", help="YAML file, or the name of a recipe (demo).")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="SECTION.FIELD=VALUE", help="Changes to the recipe.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        Console().print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of expected failures too.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb; both act elsewhere."""


def say(line: object) -> None:
    """One line for the user, as it is."""
    Console().print(Text(str(line)), soft_wrap=True)


_KNOWN_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "Please use DTensor instead",
    "`load_state_dict` is deprecated",
)
"""Megatron-Core and torch say these in every process without a GPU, or at every checkpoint; see the README's limits."""


def main() -> None:
    """Entry point of the console script."""
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message)
    ranks_too = (f"ignore:{message}" for message in _KNOWN_WARNINGS)
    os.environ["PYTHONWARNINGS"] = ",".join((*ranks_too, *filter(None, [os.environ.get("PYTHONWARNINGS")])))
    app()
