"""The command line: one thin verb per step of a run.

Nothing heavy is imported before a verb knows that its input makes sense, so that `--help`, a typo and a bad value
answer at once. Expected failures print their message and leave with the exit code of their class; `--debug` shows
the traceback as well.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from megatron_deepstack import __version__
from megatron_deepstack.errors import ConfigError, DeepStackError


class Verbs(TyperGroup):
    """The group of verbs; turns expected failures into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DeepStackError as error:
            if ctx.params.get("debug"):
                raise
            _fail(error)


def _fail(error: DeepStackError) -> NoReturn:
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

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file, or the name of a recipe (demo).")]
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


@app.command()
def draw(
    output: Annotated[Path, typer.Argument(help="Folder to create.")],
    num_train: Annotated[int, typer.Option(min=1, help="Training pictures.")] = 0,
    num_heldout: Annotated[int, typer.Option(min=1, help="Held-out pictures.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of pictures and texts.")] = 1,
) -> None:
    """Draw the demo's data set: document pictures, questions, a held-out split and a tokenizer."""
    from megatron_deepstack.demo.draw import draw as draw_data

    draw_data(output, num_train=num_train, num_heldout=num_heldout, seed=seed)


@app.command()
def preprocess(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster, or `auto`; by default Ray starts here.")
    ] = None,
) -> None:
    """Turn data.records, data.images and data.tokenizer into the zarr store data.store, with Ray."""
    from megatron_deepstack.config.check import require
    from megatron_deepstack.config.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    require(loaded, ("data.records", "data.images", "data.tokenizer", "data.store"), "preprocess")
    from orchestration.preprocess.run import preprocess as run

    run(loaded, address=address)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes; by default one replica of the model.")] = None,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Save and stop after this step, to resume.")] = None,
) -> None:
    """Train, or resume from the newest checkpoint in run_dir. Starts the ranks itself unless under torchrun."""
    from megatron_deepstack.config.check import require
    from megatron_deepstack.planning.check import check_world, load_checked_recipe, model_ranks

    loaded = load_checked_recipe(recipe, overrides or ())
    require(loaded, ("data.store",), "train")
    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    num_ranks = int(os.environ["WORLD_SIZE"]) if started else ranks or model_ranks(loaded.parallel)
    check_world(loaded, num_ranks)
    if started:
        from megatron_deepstack.training.main import train as run_rank

        run_rank(loaded, stop_after=stop_after)
        return
    from megatron_deepstack.training.launch import launch

    launch(loaded, num_ranks=num_ranks, stop_after=stop_after)


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run with a checkpoint.")],
    overrides: Overrides = None,
    store: Annotated[Path | None, typer.Option(help="Questions; by default the run's data.validation_store.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Answer only the first questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 16,
) -> None:
    """Answer the questions of a held-out store with a run's newest checkpoint, and score exact matches."""
    loaded = _recipe_of_run(run, overrides or [])
    from megatron_deepstack.inference.launch import generate as answer

    answer(loaded, store=store, limit=limit, max_new_tokens=max_new_tokens)


def _recipe_of_run(run: Path, overrides: list[str]) -> Any:
    from megatron_deepstack.planning.check import load_checked_recipe

    file = run / "recipe.yaml"
    if not file.is_file():
        raise ConfigError([f"{run}: holds no recipe.yaml; expected the run_dir of a finished or stopped `train`"])
    return load_checked_recipe(file, [*overrides, f"run_dir={run}"])


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]) -> None:
    """Write RUN/report.html: one page with losses, recipe, stage plan and held-out answers."""
    from megatron_deepstack.report.page import write_report

    Console().print(Text(f"report: {write_report(run)}"), soft_wrap=True)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Check the layout for this many processes.")] = None,
) -> None:
    """Show which stage holds which layers and stacks. Starts nothing."""
    from megatron_deepstack.planning.check import check_world, load_checked_recipe, model_ranks
    from megatron_deepstack.report.plan_text import plan_table

    loaded = load_checked_recipe(recipe, overrides or ())
    check_world(loaded, ranks or model_ranks(loaded.parallel))
    Console().print(plan_table(loaded))


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
