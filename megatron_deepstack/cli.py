"""The command line: one thin verb per step of a run.

Nothing heavy is imported before a verb knows that its input makes sense, so that `--help`, a typo and a bad value
answer at once. Expected failures print their message and leave with the exit code of their class; `--debug` shows
the traceback as well.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from megatron_deepstack import __version__
from megatron_deepstack.config.schema import EncoderPlacement, ParallelConfig, Recompute
from megatron_deepstack.errors import ConfigError, DataError, DeepStackError


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
    """Say what is wrong, once: under torchrun every rank comes here."""
    if os.environ.get("RANK", "0") != "0":
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
    num_train: Annotated[int, typer.Option(min=1, help="Training pictures.")] = 4000,
    num_heldout: Annotated[int, typer.Option(min=1, help="Held-out pictures.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of pictures and texts.")] = 1,
) -> None:
    """Draw the demo's data set: document pictures, questions, a held-out split and a tokenizer."""
    _say(f"draw: {num_train} training and {num_heldout} held-out pictures in {output}")
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
    """Turn data.records, data.images and data.tokenizer into the zarr store data.store, with Ray."""
    from megatron_deepstack.config.check import require
    from megatron_deepstack.config.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    require(loaded, ("data.records", "data.tokenizer", "data.store"), "preprocess")
    assert loaded.data.store is not None
    _say(f"preprocess: {loaded.data.records} -> {loaded.data.store}")
    from orchestration.preprocess.run import preprocess as run

    _say(_summary(run(loaded, loaded.data.store, workers=workers, address=address)))


def _summary(done: Any) -> str:
    """What preprocessing did, in two lines."""
    faults = f", {done.quarantined} quarantined and {done.dropped} samples with them" if done.quarantined else ""
    return (
        f"{done.store}: {done.samples} samples, {done.images} images, {done.views} views{faults}\n"
        f"{done.tokens} tokens, {done.target_tokens} of them learned; {done.written_bytes / 1e6:.0f} MB in "
        f"{done.seconds:.1f} s, {done.images_per_second:.0f} images/s"
    )


def _say(line: object) -> None:
    Console().print(Text(str(line)), soft_wrap=True)


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
    from megatron_deepstack.report.plan_text import plan_table

    Console().print(plan_table(loaded))
    _say(f"train: starting {num_ranks} {'process' if num_ranks == 1 else 'processes'}, run folder {loaded.run_dir}")
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
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run with a checkpoint.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to create.")],
    naming: Annotated[
        str,
        typer.Option(
            help="`published`: DeepStack's own names. `hugging_face`: for variant llava, as transformers loads it."
        ),
    ] = "published",
) -> None:
    """Write a run's newest checkpoint as safetensors with config.json, for others to load and for train.init_from."""
    if naming not in ("published", "hugging_face"):
        raise ConfigError([f"--naming: found {naming!r}, expected published or hugging_face"])
    from megatron_deepstack.convert.hf_names import Naming
    from megatron_deepstack.inference.export import export_run

    _say(f"export: {export_run(run, output, Naming(naming))}")


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]) -> None:
    """Write RUN/report.html: one page with losses, recipe, stage plan and held-out answers."""
    from megatron_deepstack.report.page import write_report

    _say(f"report: {write_report(run)}")


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Check the layout for this many processes.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the plan as a drawing to this file too.")] = None,
) -> None:
    """Show which stage holds which layers and stacks. Starts nothing."""
    from megatron_deepstack.planning.check import check_world, load_checked_recipe, model_ranks
    from megatron_deepstack.report.plan_text import plan_table

    loaded = load_checked_recipe(recipe, overrides or ())
    check_world(loaded, ranks or model_ranks(loaded.parallel))
    Console().print(plan_table(loaded))
    if svg is not None:
        from megatron_deepstack.report.stages import stage_drawing

        try:
            svg.write_text(stage_drawing(loaded) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"--svg {svg}: cannot be written: {error.strerror}") from error


@app.command(name="check-reference")
def check_reference(
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="Cases, NAME.safetensors.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 1,
    vpp: Annotated[int, typer.Option(min=1, help="Chunks per stage.")] = 1,
    cp: Annotated[int, typer.Option(min=1, help="Context-parallel ranks.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Replicas.")] = 1,
    sequence_parallel: Annotated[bool, typer.Option("--sequence-parallel", help="With --tp above 1.")] = False,
    recompute: Annotated[Recompute, typer.Option(help="Activation recomputation.")] = Recompute.NONE,
    encoder_placement: Annotated[
        EncoderPlacement, typer.Option(help="Where ViT and projector run.")
    ] = EncoderPlacement.SPREAD,
    crops: Annotated[Path | None, typer.Option(help="Folder with crops.npz; compares the cut of --photos.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of the photos that --crops was made from.")] = None,
    conversations: Annotated[Path | None, typer.Option(help="conversations.json; needs --tokenizer.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="SentencePiece model that --conversations used.")] = None,
) -> None:
    """Compare with numbers of the published implementation; fails beyond the tolerances. Starts its own ranks."""
    _together(crops=crops, photos=photos)
    _together(conversations=conversations, tokenizer=tokenizer)
    if not (files or crops or conversations):
        raise typer.BadParameter("nothing to compare: give FILE..., --crops and --photos, or --conversations")
    if files:
        from megatron_deepstack.testing.reference import check_cases

        layout = ParallelConfig(
            tensor=tp,
            pipeline=pp,
            virtual_pipeline=vpp,
            context=cp,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
            encoder_placement=encoder_placement,
        )
        _say_all(check_cases(files, layout, data_parallel=dp))
    if crops and photos:
        from megatron_deepstack.testing.reference_data import check_crops

        _say_all(check_crops(crops, photos))
    if conversations and tokenizer:
        from megatron_deepstack.testing.reference_data import check_conversations

        _say_all(check_conversations(conversations, tokenizer))


def _together(**options: Path | None) -> None:
    """Two options of which one makes no sense without the other."""
    absent = [f"--{name}" for name, value in options.items() if value is None]
    if len(absent) == 1:
        raise typer.BadParameter(
            f"{absent[0]} is needed too: {' and '.join(f'--{name}' for name in options)} go together"
        )


def _say_all(results: Iterable[object]) -> None:
    for result in results:
        _say(result)


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


if __name__ == "__main__":
    main()
