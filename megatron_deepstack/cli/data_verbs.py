"""Verbs before training: draw the demo's data, preprocess."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_deepstack.cli.app import Overrides, RecipeArgument, app, say


@app.command()
def draw(
    output: Annotated[Path, typer.Argument(help="Folder to create.")],
    num_train: Annotated[int, typer.Option(min=1, help="Training pictures.")] = 4000,
    num_heldout: Annotated[int, typer.Option(min=1, help="Held-out pictures.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of pictures and texts.")] = 1,
) -> None:
    """Draw the demo's data set: document pictures, questions, a held-out split and a tokenizer."""
    say(f"draw: {num_train} training and {num_heldout} held-out pictures in {output}")
    from megatron_deepstack.demo.draw import draw as draw_data

    draw_data(output, num_train=num_train, num_heldout=num_heldout, seed=seed)


@app.command()
def preprocess(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Worker processes; all CPUs by default, 0 for none and no Ray.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster, or `auto`; by default Ray starts here.")
    ] = None,
) -> None:
    """Turn data.records, data.images and data.tokenizer into the zarr store data.store, with Ray.

    If it is stopped or killed, the same command continues the work. Folders may be URLs (s3://bucket/...).
    """
    from megatron_deepstack.config.check import require
    from megatron_deepstack.config.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    require(loaded, ("data.records", "data.tokenizer", "data.store"), "preprocess")
    assert loaded.data.records
    assert loaded.data.store is not None
    say(f"preprocess: {', '.join(loaded.data.records)} -> {loaded.data.store}")
    from orchestration.preprocess.driver.run import preprocess as run

    say(_summary(run(loaded, loaded.data.store, workers=workers, address=address)))


def _summary(done: Any) -> str:
    """What preprocessing did, in two lines, and a third line if anything went wrong."""
    from megatron_deepstack.data.store.quarantine import in_words
    from orchestration.preprocess.units import in_units

    seconds = f"{done.seconds:.1f} s, {done.images_per_second:.0f} images/s"
    where = f" on {len(done.nodes)} nodes" if len(done.nodes) > 1 else ""
    work = f"{in_units(done.written_bytes)} in {seconds}{where}"
    if done.parts_done_before == done.parts:
        work = "the store is complete already, no part was left to do"
    trouble = [
        f"{done.quarantined} images quarantined and {done.dropped} samples with them" if done.quarantined else "",
        f"{done.flagged} images flagged but stored ({in_words(done.flagged_by_reason)})" if done.flagged else "",
        f"{done.parts_done_again} parts done again after their worker or node died" if done.parts_done_again else "",
    ]
    lines = [
        f"{done.store}: {done.samples} samples, {done.images} images, {done.views} views",
        f"{done.tokens} tokens, {done.target_tokens} of them learned; {work}",
        "; ".join(filter(None, trouble)),
    ]
    listed = f" (listed in {done.store}/quarantine.jsonl)" if done.quarantined or done.flagged else ""
    return "\n".join(filter(None, lines)) + listed
