"""Verbs of a run: train, generate, export, report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from megatron_deepstack.cli.app import Overrides, RecipeArgument, app, say, tell
from megatron_deepstack.cli.output import JsonOption, print_json, stdout_for_results
from megatron_deepstack.cli.plan_verbs import show_before_start
from megatron_deepstack.config.constraints import PathKind
from megatron_deepstack.errors import ConfigError, of_all_ranks


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes; by default one replica of the model.")] = None,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Save and stop after this step, to resume.")] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="How often to start again from the newest checkpoint after a rank died or hung.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build some ranks of --world without memory.")] = False,
    world: Annotated[int | None, typer.Option(help="Ranks in all, for --dry-run; up to 4096.")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="A rank to build, for --dry-run; first and last else.")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Start even if memory seems too small.")] = False,
) -> None:
    """Train, or resume from the newest checkpoint in run_dir. Starts the ranks itself unless under torchrun.

    With --dry-run nothing is trained: chosen ranks of a world of any size are built without memory, one after another,
    and plan a step; each part's CPU time and memory are shown.

    After SIGTERM or Ctrl-C it saves and ends with exit code 75; the same command continues the run.
    """
    if dry_run:
        from megatron_deepstack.cli.plan_verbs import show_dry_run

        show_dry_run(recipe, overrides or [], world, rank or [], say)
        return
    if world is not None or rank:
        raise ConfigError(["--world and --rank: they belong to --dry-run; add it, or use --ranks"])
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _refuse_under_torchrun(ranks, restarts)
        from megatron_deepstack.training.main import train_under_torchrun

        num_ranks = int(os.environ["WORLD_SIZE"])
        train_under_torchrun(lambda: _recipe_to_train(recipe, overrides or [], num_ranks), stop_after, say)
        return
    loaded = _recipe_to_train(recipe, overrides or [], ranks)
    from megatron_deepstack.planning.check import model_ranks
    from megatron_deepstack.report.plan_text import plan_table

    num_ranks = ranks or model_ranks(loaded.parallel)
    Console().print(plan_table(loaded))
    show_before_start(loaded, num_ranks, anyway, say)
    say(f"train: starting {num_ranks} {'process' if num_ranks == 1 else 'processes'}, run folder {loaded.run_dir}")
    from megatron_deepstack.training.launch import train_here

    train_here(loaded, num_ranks=num_ranks, say=say, stop_after=stop_after, restarts=restarts)


def _recipe_to_train(recipe: str, overrides: list[str], ranks: int | None) -> Any:
    """The recipe, checked for training on this number of ranks. Raises ConfigError."""
    from megatron_deepstack.config.check import require
    from megatron_deepstack.planning.check import check_world, load_checked_recipe, model_ranks

    loaded = load_checked_recipe(recipe, overrides)
    require(loaded, () if loaded.data.stores else ("data.store",), "train")
    check_world(loaded, ranks or model_ranks(loaded.parallel))
    return loaded


def _refuse_under_torchrun(ranks: int | None, restarts: int) -> None:
    """Raise ConfigError for options that only the process that starts the ranks can obey."""
    problems = []
    if ranks is not None:
        problems.append(
            f"--ranks {ranks}: torchrun has started {os.environ['WORLD_SIZE']} already; leave it out, and tell "
            "torchrun with --nnodes and --nproc-per-node"
        )
    if restarts:
        problems.append(
            f"--restarts {restarts}: a rank cannot start the others again; leave it out, and give torchrun "
            f"--max-restarts={restarts}"
        )
    if problems:
        raise of_all_ranks(ConfigError(problems))


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run with a checkpoint.")],
    overrides: Overrides = None,
    store: Annotated[
        str | None,
        PathKind.LOCATION,
        typer.Option(help="Folder or URL of questions; by default the run's data.validation_store."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Answer only the first questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 16,
    as_json: JsonOption = False,
) -> None:
    """Answer the questions of a held-out store with a run's newest checkpoint, and score exact matches.

    `preprocess` makes such a store of records; the first answer of each record is the expected one. Answers to the
    run's data.validation_store go to RUN/answers.jsonl. Answers to another store, or only to the first questions, go to
    a file of their own in RUN/answers/. Relative paths in the run's recipe start from the folder in which the run was
    started.
    """
    from megatron_deepstack.planning.check import checked
    from megatron_deepstack.run_folder.recipe import checkable_recipe_of_run, recipe_of_run

    held_out = recipe_of_run(run).data.validation_store
    loaded = checked(*checkable_recipe_of_run(run, overrides or []))
    with stdout_for_results(as_json):
        from megatron_deepstack.inference.launch import generate as answer
        from megatron_deepstack.inference.launch import show

        done = answer(loaded, held_out=held_out, store=store, limit=limit, max_new_tokens=max_new_tokens, say=tell)
    if as_json:
        print_json({"run": str(run), **done.document()})
    else:
        show(done)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run with a checkpoint.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to create.")],
    overrides: Overrides = None,
    naming: Annotated[
        str,
        typer.Option(
            help="`published`: DeepStack's own names. `hugging_face`: a folder that transformers loads and prompts."
        ),
    ] = "published",
    adapters: Annotated[
        str,
        typer.Option(
            help="LoRA adapters: `merged` into the weights; `left_out`; or `alone`, without the model, as PEFT reads "
            "them."
        ),
    ] = "merged",
) -> None:
    """Write a run's newest checkpoint as safetensors with config.json, for others to load and for train.init_from."""
    if naming not in ("published", "hugging_face"):
        raise ConfigError([f"--naming: found {naming!r}, expected published or hugging_face"])
    if adapters not in ("merged", "left_out", "alone"):
        raise ConfigError([f"--adapters: found {adapters!r}, expected merged, left_out or alone"])
    from megatron_deepstack.convert.hf_names import Naming
    from megatron_deepstack.inference.export import Adapters, export_run

    done = export_run(run, output, Naming(naming), overrides or (), adapters=Adapters(adapters), say=tell)
    say(f"export: {done}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of weights with a config.json.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to create.")],
    to: Annotated[
        str,
        typer.Option(
            help="`hugging_face`: as transformers loads and prompts it. `paper`: the published names. `checkpoint`: a "
            "run folder from which `train` begins."
        ),
    ] = "hugging_face",
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Size of a file of weights in GB.")] = 5.0,
    check: Annotated[
        bool,
        typer.Option("--check", help="Compare what both compute; if TARGET is there already, compare alone."),
    ] = False,
    picture: Annotated[
        list[Path] | None, typer.Option(help="A picture to compare on, beside drawn ones; may be repeated.")
    ] = None,
) -> None:
    """Write a folder of weights in another layout: an export of either naming, LLaVA's, or a release of DeepStack.

    No run is needed and no model is built. Every tensor keeps its dtype and its bytes, and one at a time is in memory.
    """
    namings = {"hugging_face": "hugging_face", "paper": "published"}
    if to not in (*namings, "checkpoint"):
        raise ConfigError([f"--to: found {to!r}, expected {', '.join(namings)} or checkpoint"])
    if picture and not check:
        raise ConfigError(["--picture: pictures are for --check; add it"])
    if not (check and target.is_dir() and any(target.iterdir())):
        if to == "checkpoint":
            from megatron_deepstack.inference.to_checkpoint import checkpoint_of_folder

            checkpoint_of_folder(source, target, say=tell)
        else:
            from megatron_deepstack.convert.folders import convert_folder
            from megatron_deepstack.convert.hf_names import Naming

            convert_folder(source, target, Naming(namings[to]), shard_bytes=int(shard_gb * 1e9), say=tell)
        say(f"convert: {target}")
    if check:
        from megatron_deepstack.testing.parity.conversion import check_conversion

        for line in check_conversion(source, target, picture or ()):
            say(line)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folder of a run, or of several to compare.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; by default in the first run's folder.")
    ] = None,
) -> None:
    """Write RUN/report.html: losses, speed, events, recipe, answers; or one page that compares several runs.

    The page is one file that needs no network. Open it in a browser.
    """
    from megatron_deepstack.report.compare import warnings, write_comparison
    from megatron_deepstack.report.page import write_report

    if len(runs) == 1:
        say(f"report: {write_report(runs[0], output)}")
        return
    written = write_comparison(runs, output)
    for line in warnings(runs):
        tell(f"report: {line}")
    say(f"report: {written}")
