"""Verbs of a job on a Ray cluster: launch, status, stop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_deepstack.cli.app import Overrides, RecipeArgument, app, say
from megatron_deepstack.cli.output import JsonOption, print_json
from megatron_deepstack.cli.plan_verbs import show_before_start


@app.command()
def launch(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster, or `auto`; by default Ray starts here.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks in all; by default launch.ranks.")] = None,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Save and stop after this step, to resume.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show what would happen, no more.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Start even if memory seems too small.")] = False,
) -> None:
    """Train on a Ray cluster, with restarts after failures; resumes from the newest checkpoint in run_dir."""
    from megatron_deepstack.config.check import require
    from megatron_deepstack.planning.check import check_world, load_checked_recipe, model_ranks
    from megatron_deepstack.platform.compute.gpu_model import gpu_model

    loaded = load_checked_recipe(recipe, overrides or ())
    require(loaded, () if loaded.data.stores else ("data.store",), "launch")
    check_world(loaded, ranks or loaded.launch.ranks or model_ranks(loaded.parallel))
    if gpu_model() is not None:  # of this machine, as those of a cluster's other nodes are not known yet
        show_before_start(loaded, ranks or loaded.launch.ranks or model_ranks(loaded.parallel), anyway, say)
    if dry_run:
        from orchestration.launch.driver.run import dry_run as describe

        describe(loaded, Console(markup=False, emoji=False).print, num_ranks=ranks, address=address)
        return
    say(f"launch: run folder {loaded.run_dir}")
    from orchestration.launch.driver.run import launch as run

    run(loaded, num_ranks=ranks, address=address, stop_after=stop_after)
    say("launch: finished")


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a run is doing: step, loss, time left, restarts and their reasons, ranks and nodes, newest checkpoint.

    The exit code is 0 while the run continues or after it has finished. If `launch` started the run and it stopped or
    failed, it is the run's own exit code. A run of `train` or torchrun leaves no record of its end: if it ended before
    its last step, the state is "not running", and the exit code is 0. If the process that works in the folder has
    ended without giving it back, the state is "lost", and the exit code is 1.
    """
    from orchestration.launch.before.report import status_document, status_text
    from orchestration.launch.driver.control import status_of

    found = status_of(run)
    if as_json:
        print_json(status_document(found))
    else:
        say(status_text(found))
    raise typer.Exit(found.exit_code)


@app.command()
def stop(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that `launch` has started.")],
    now: Annotated[bool, typer.Option("--now", help="End at once; what was not saved is lost.")] = False,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the end.")] = 600.0,
) -> None:
    """Let a launched run save and end, from any shell that sees its folder; `launch` continues it later."""
    from orchestration.launch.driver.control import stop as end

    say(end(run, now=now, wait_seconds=min(wait, 30.0) if now else wait))
