"""Verbs about a finished store: `store verify`, `show`, `stats`, `merge`, `split`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from megatron_deepstack.cli.app import Verbs, app, say
from megatron_deepstack.cli.output import JsonOption, print_json
from megatron_deepstack.config.constraints import PathKind
from megatron_deepstack.errors import ConfigError, DataError, StoreError

stores = typer.Typer(cls=Verbs, no_args_is_help=True, help="Look at finished stores, and make new ones of them.")
app.add_typer(stores, name="store")

StorePath = Annotated[
    str, PathKind.LOCATION, typer.Argument(metavar="STORE", help="Folder or URL of a finished store.")
]


@contextmanager
def _shards_done(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, lines elsewhere; call it with the number of shards done, and of all."""
    from megatron_deepstack.platform.progress import WorkProgress

    with WorkProgress(f"store {verb}", 1, "shards") as progress:

        def at(done: int, total: int) -> None:
            progress.total = total
            progress.at(done)

        yield at


@stores.command()
def verify(
    path: StorePath,
    processes: Annotated[int | None, typer.Option(min=1, help="Shards read at a time; by default all CPUs.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every checksum, count and reference of a store, and list all damage."""
    from megatron_deepstack.storekeeping.verify import verify as find_damage

    with _shards_done("verify") as progress:
        found = find_damage(path, processes=processes, progress=progress)
    if as_json:
        faults = [{"where": one.where, "what": one.what, "advice": one.advice} for one in found]
        print_json({"store": path, "whole": not found, "faults": faults})
    for damage in () if as_json else found:
        say(damage)
    if found:
        raise StoreError(f"{path}: {len(found)} {'fault' if len(found) == 1 else 'faults'}, listed above")
    if not as_json:
        say(f"{path}: whole; every checksum, count and reference is right")


RecipeOption = Annotated[
    str | None,
    PathKind.LOCAL,
    typer.Option(
        "--recipe",
        help="Recipe of the model that is to read the store; by default the model of its views.",
    ),
]


@stores.command()
def show(
    path: StorePath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write.")] = Path("samples.html"),
    number: Annotated[int, typer.Option(min=1, help="Samples drawn at random.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Which samples are drawn.")] = 0,
    sample: Annotated[list[int] | None, typer.Option(min=0, help="Numbers of samples to show instead.")] = None,
    recipe: RecipeOption = None,
    tokenizer: Annotated[
        str | None, PathKind.LOCAL, typer.Option(help="Tokenizer of the store; by default the recipe's.")
    ] = None,
) -> None:
    """Write one HTML page of samples: pictures, grids, tokens in their stacks' colours, texts and what is learned."""
    from megatron_deepstack.storekeeping.choose import chosen, load, tokenizer_for
    from megatron_deepstack.storekeeping.show import write_page

    store, model = load(path, recipe)
    numbers = chosen(store, sample, number, seed)
    text = tokenizer_for(store, tokenizer, recipe)
    write_page(output, store, model, numbers, text, slots_known=recipe is not None)
    say(f"store show: {len(numbers)} of {len(store)} samples in {output}")


@stores.command()
def stats(
    path: StorePath,
    recipe: RecipeOption = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the histograms into this file too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Count what a store holds: sizes, grids, views, tokens with and without images."""
    from megatron_deepstack.storekeeping.choose import load
    from megatron_deepstack.storekeeping.stats import statistics
    from megatron_deepstack.storekeeping.stats_drawing import drawn

    found = statistics(*load(path, recipe))
    if as_json:
        print_json({"store": path, **found.document()})
    else:
        _print_stats(found)
    if svg is not None:
        from megatron_deepstack.platform.files.write_whole import write_result

        try:
            write_result(svg, drawn(found, f"Sizes of images and samples in {path}") + "\n")
        except OSError as error:
            raise DataError(f"--svg {svg}: cannot be written: {error.strerror}") from error


_LONGEST_BAR = 40
"""The length of the longest bar in columns of the terminal, if there is space."""


def _print_stats(found: Any) -> None:
    from rich.table import Table

    console = Console(markup=False, emoji=False)
    room = max(console.width - 2, 20)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for fact in found.facts:
        facts.add_row(*fact)
    console.print(facts)
    for histogram in found.histograms:
        most = max((count for _, count in histogram.bins), default=1)
        table = Table(histogram.title, histogram.of, "", box=None, padding=(0, 2, 0, 0), title_justify="left")
        taken = max((len(label) for label, _ in histogram.bins), default=0)
        taken = max(taken, min(len(histogram.title), room // 2)) + max(len(histogram.of), len(f"{most:,}")) + 6
        longest = max(min(_LONGEST_BAR, room - taken), 1)
        for label, count in histogram.bins:
            table.add_row(label, f"{count:,}", "\u2588" * max(round(longest * count / most), count > 0))
        console.print()
        console.print(table)


@stores.command()
def merge(
    output: Annotated[str, PathKind.LOCAL, typer.Argument(metavar="OUT", help="Store to create.")],
    inputs: Annotated[list[str], PathKind.LOCAL, typer.Argument(metavar="IN...", help="Finished stores, two or more.")],
) -> None:
    """Make one store of several that were preprocessed alike. Shards are linked, images in several kept once."""
    from megatron_deepstack.storekeeping.rewrite.merge import merge as put_together

    created, *taken = map(_folder, (output, *inputs))
    with _shards_done("merge") as progress:
        done = put_together(created, taken, progress)
    say(
        f"{output}: {done.samples} samples, {done.images} images ({done.shared} of several stores, kept once), "
        f"{done.whole} of {done.shards} shards taken as they were"
    )


@stores.command()
def split(
    path: Annotated[str, PathKind.LOCAL, typer.Argument(metavar="STORE", help="Folder of a finished store.")],
    train: Annotated[str, PathKind.LOCAL, typer.Argument(metavar="TRAIN", help="Store to create for the larger side.")],
    heldout: Annotated[
        str, PathKind.LOCAL, typer.Argument(metavar="HELDOUT", help="Store to create for the samples drawn.")
    ],
    fraction: Annotated[float | None, typer.Option(min=0, max=1, help="Share of the samples to hold out.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Number of samples to hold out.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which samples are drawn.")] = 0,
) -> None:
    """Divide a store's samples at random into two stores, each with the images that its samples use."""
    if (fraction is None) == (count is None):
        raise ConfigError(["give one of --fraction and --count"])
    from megatron_deepstack.storekeeping.rewrite.assemble import open_local
    from megatron_deepstack.storekeeping.rewrite.split import split as divide

    whole, larger, smaller = map(_folder, (path, train, heldout))
    wanted = count if count is not None else round((fraction or 0) * len(open_local(whole)))
    with _shards_done("split") as progress:
        done = divide(whole, larger, smaller, count=wanted, seed=seed, progress=progress)
    say(f"{train}: {done.train_samples} samples, {done.train_images} images")
    say(f"{heldout}: {done.heldout_samples} samples, {done.heldout_images} images, {done.in_both} of them in both")


def _folder(text: str) -> Path:
    """The folder of a store to read or to create. Raises StoreError for a URL."""
    from megatron_deepstack.data.location import Location

    location = Location.parse(text)
    if not location.is_local:
        raise StoreError(
            f"{text}: stores are merged and split in folders, not at URLs; copy what lies there to a folder first"
        )
    return location.local_path()
