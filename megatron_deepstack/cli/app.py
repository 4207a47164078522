"""The command line: one thin verb for each step of a run.

Nothing heavy is imported before a verb knows that its input makes sense, so that `--help`, a typo and a bad value are
answered at once. Expected failures print their message and end with the exit code of their class; `--debug` shows the
traceback as well.
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
from megatron_deepstack.cli.catalogue import examples_text, group_of, place_of
from megatron_deepstack.cli.output import complete_recipe
from megatron_deepstack.config.constraints import PathKind
from megatron_deepstack.errors import ConfigError, DeepStackError

INTERRUPTED = 130
"""Exit code after Ctrl-C in a verb that has nothing to save, as shells have it."""


class Verbs(TyperGroup):
    """A group of verbs; turns expected failures into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DeepStackError as error:
            if ctx.find_root().params.get("debug"):
                traceback.print_exception(error)
            _fail(error)
        except KeyboardInterrupt as error:
            # Verbs with work to save or to give back handle the signal themselves, and end with words of their own.
            verb = _path(ctx, ctx.invoked_subcommand or "")
            tell(f"{verb}: stopped on request before it was done; the same command starts again")
            raise typer.Exit(INTERRUPTED) from error

    def list_commands(self, ctx: Any) -> list[str]:
        """The verbs in the order of the work."""
        return sorted(super().list_commands(ctx), key=lambda name: place_of(_path(ctx, name)))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb, with its group and its examples for `--help`.

        Args:
            ctx: Typer's context of the group.
            cmd_name: The verb as the user typed it.

        Returns:
            Typer's command; None if there is no such verb.
        """
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            path = _path(ctx, cmd_name)
            command.rich_help_panel = group_of(path)  # type: ignore[attr-defined]
            command.epilog = examples_text(path)
            command.help = "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))
        return command


def _path(ctx: Any, name: str) -> str:
    """The name of a verb as users type it: `train`, or `store show` for a verb of a group."""
    return name if ctx.parent is None else f"{ctx.info_name} {name}"


def _fail(error: DeepStackError) -> NoReturn:
    """Print what is wrong, once.

    If all ranks of torchrun raise the same error, the rank that found it prints it, or rank 0. An error that only one
    rank knows is printed by that rank.
    """
    rank = os.environ.get("RANK", "0")
    if error.agreed and rank != str(error.rank or 0):
        raise typer.Exit(error.exit_code)
    console = Console(stderr=True)
    lines = error.problems if isinstance(error, ConfigError) else (str(error),)
    title = f"{len(lines)} problems" if len(lines) > 1 else "error"
    if error.rank is not None:
        title += f" on rank {error.rank}" + (f" ({error.host})" if error.host else "")
    console.print(Text(title, style="bold red"))
    for line in lines:
        console.print(Text(f"  {line}"), soft_wrap=True)
    raise typer.Exit(error.exit_code)


app = typer.Typer(
    name="megatron-deepstack",
    cls=Verbs,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Train DeepStack multimodal language models: images and JSON in, checkpoint and answers out.",
)

RecipeArgument = Annotated[
    str,
    PathKind.LOCAL,
    typer.Argument(
        metavar="RECIPE",
        help="YAML file, or the name of a recipe (`recipes` lists them).",
        autocompletion=complete_recipe,
    ),
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
    """Options before the verb; both are handled in other places."""


def say(line: object) -> None:
    """Print one line for the user, without any markup."""
    Console().print(Text(str(line)), soft_wrap=True)


def tell(line: object) -> None:
    """Print one line about what is being done to stderr, so that stdout holds only results."""
    Console(stderr=True).print(Text(str(line)), soft_wrap=True)


_KNOWN_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "Please use DTensor instead",
    "`load_state_dict` is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
)
"""Megatron-Core and torch print these in every process: without a GPU, at every checkpoint, or under tensor parallelism
(Megatron-Core calls torch by older names). A user can do nothing about them."""


def main() -> None:
    """Entry point of the console script."""
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message)
    ranks_too = (f"ignore:{message}" for message in _KNOWN_WARNINGS)
    os.environ["PYTHONWARNINGS"] = ",".join((*ranks_too, *filter(None, [os.environ.get("PYTHONWARNINGS")])))
    app()
