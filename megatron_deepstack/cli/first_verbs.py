"""Verbs before anything starts: `recipes` and `doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_deepstack.cli.app import Overrides, app, say
from megatron_deepstack.cli.output import JsonOption, complete_recipe, print_json


@app.command()
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="Recipe to print, resolved.", autocompletion=complete_recipe),
    ] = None,
    overrides: Overrides = None,
    as_json: JsonOption = False,
) -> None:
    """List the recipes that come with the package, one line each; with a name, print that recipe with every field.

    The printed text is a recipe itself: write it to a file, change it, and give the file to the other verbs.
    """
    if name is not None:
        from megatron_deepstack.config.build import plain
        from megatron_deepstack.config.load import load_recipe, recipe_to_yaml

        loaded = load_recipe(name, overrides or ())
        if as_json:
            print_json(plain(loaded))
        else:
            typer.echo(recipe_to_yaml(loaded), nl=False)
        return
    from megatron_deepstack.planning.shipped import shipped_recipes

    found = shipped_recipes()
    if as_json:
        print_json({"recipes": [asdict(one) for one in found]})
        return
    console = Console()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("recipe", "model", "one replica", "made for", "what it is"):
        table.add_column(heading, no_wrap=heading != "what it is", overflow="fold")
    for one in found:
        model = f"{one.variant}, {_size(one.parameters)}"
        table.add_row(*map(Text, (one.name, model, one.layout, one.made_for or "-", one.about)))
    if console.width >= 120:
        console.print(table)
    else:
        for one in found:
            say(f"{one.name}: {one.about} ({one.variant}, {_size(one.parameters)}, {one.layout})")


def _size(parameters: int) -> str:
    """A number of parameters in a short form, such as `7.1B`."""
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2g}M"


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where runs are going to lie.")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Show what this machine offers and lacks: versions, devices, memory, disk, Ray, ports; and what to do about it.

    The exit code is 1 if something is lacking that training needs, otherwise 0. Ray is started once as a test, which
    takes some seconds; a library that fails or hangs becomes a line of the list.
    """
    from orchestration.doctor.examine import LACKING_EXIT_CODE, examine
    from orchestration.doctor.finding import State

    console, found = Console(), []
    marks = {State.GOOD: ("ok", "green"), State.NOTE: ("note", "yellow"), State.LACKING: ("LACKING", "bold red")}
    for finding in examine(folder):
        found.append(finding)
        if not as_json:
            mark, style = marks[finding.state]
            line = Text.assemble((f"{mark:<8}", style), (f"{finding.subject}: ", "bold"), finding.found)
            console.print(line, soft_wrap=True)
            if finding.advice:
                console.print(Text(f"        {finding.advice}", style="dim"), soft_wrap=True)
    lacking = [finding.subject for finding in found if finding.state is State.LACKING]
    if as_json:
        print_json({"ready": not lacking, "findings": [asdict(finding) for finding in found]})
    elif lacking:
        say(f"lacking: {', '.join(lacking)}; training cannot run here before that is put right")
    else:
        say("nothing is lacking that training needs")
    raise typer.Exit(LACKING_EXIT_CODE if lacking else 0)
