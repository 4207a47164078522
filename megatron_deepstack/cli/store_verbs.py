"""Verbs about a finished store: `store verify`, `show`, `stats`, `merge`, `split`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_deepstack.cli.app import Verbs, app, say
from megatron_deepstack.errors import StoreError

stores = typer.Typer(cls=Verbs, no_args_is_help=True, help="Look at finished stores, and make new ones of them.")
app.add_typer(stores, name="store")

StorePath = Annotated[str, typer.Argument(metavar="STORE", help="Folder or URL of a finished store.")]


@stores.command()
def verify(
    path: StorePath,
    processes: Annotated[int | None, typer.Option(min=1, help="Shards read at a time; by default all CPUs.")] = None,
) -> None:
    """Check every checksum, count and reference of a store, and list all damage."""
    from megatron_deepstack.storekeeping.verify import verify as find_damage

    columns = (TextColumn("store verify"), BarColumn(), MofNCompleteColumn(), TextColumn("shards"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        found = find_damage(
            path, processes=processes, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    for damage in found:
        say(damage)
    if found:
        raise StoreError(f"{path}: {len(found)} {'fault' if len(found) == 1 else 'faults'}, listed above")
    say(f"{path}: whole; every checksum, count and reference is right")
