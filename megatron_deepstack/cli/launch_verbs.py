"""Verbs of a job on a Ray cluster: launch, status, stop."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from megatron_deepstack.cli.app import Overrides, RecipeArgument, app, say


@app.command()
def launch(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster, or `auto`; by default Ray starts here.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks in all; by default launch.ranks.")] = None,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Save and stop after this step, to resume.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show all that would happen; no training.")] = False,
) -> None:
    """Train on a Ray cluster, restarting after failures; resumes from the newest checkpoint in run_dir."""
    from megatron_deepstack.config.check import require
    from megatron_deepstack.planning.check import check_world, load_checked_recipe, model_ranks

    loaded = load_checked_recipe(recipe, overrides or ())
    require(loaded, () if loaded.data.stores else ("data.store",), "launch")
    check_world(loaded, ranks or loaded.launch.ranks or model_ranks(loaded.parallel))
    if dry_run:
        from orchestration.launch.run import dry_run as describe

        describe(loaded, Console().print, num_ranks=ranks, address=address)
        return
    say(f"launch: run folder {loaded.run_dir}")
    from orchestration.launch.run import launch as run

    run(loaded, num_ranks=ranks, address=address, stop_after=stop_after)
    say("launch: finished")
