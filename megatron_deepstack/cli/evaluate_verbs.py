"""The verb that evaluates a run: questions with known answers, scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_deepstack.cli.app import Overrides, app, say, tell
from megatron_deepstack.cli.output import JsonOption, print_json, stdout_for_results
from megatron_deepstack.config.constraints import PathKind
from megatron_deepstack.errors import ConfigError


@app.command()
def evaluate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run with a checkpoint, or a folder that `export` wrote.")
    ],
    overrides: Overrides = None,
    store: Annotated[
        str | None,
        PathKind.LOCATION,
        typer.Option(help="Folder or URL of questions; by default the run's data.validation_store."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="File of questions, JSON lines: question_id, image, text, answers.")
    ] = None,
    images: Annotated[
        str | None,
        PathKind.LOCATION,
        typer.Option(help="Folder or URL of the pictures of --file; by default the file's own folder."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Answer only the first questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes; several replicas of the model divide the questions.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the evaluation; by default that of its questions.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer questions whose answers are known, and score them: exact match, VQA accuracy, ANLS, relaxed accuracy.

    Writes RUN/evaluations/NAME: answers.jsonl, scores.json, and page.html with pictures, to sort and filter by score.
    `report RUN RUN` shows the evaluations of two runs that asked the same questions side by side.
    """
    from megatron_deepstack.run_folder.asked import check_asked

    if file is not None and store is not None:
        raise ConfigError([f"--file {file}: found --store {store} beside it, expected only one of both"])
    if name is not None and (not name.strip(". ") or "/" in name):
        raise ConfigError([f"--name: found {name!r}, expected the name of a folder"])
    check_asked(run, overrides or [])
    with stdout_for_results(as_json):
        from megatron_deepstack.inference.answerer import answerer_at
        from megatron_deepstack.inference.evaluate.exam import Questions
        from megatron_deepstack.inference.evaluate.launch import evaluate as run_evaluation
        from megatron_deepstack.inference.evaluate.launch import show
        from megatron_deepstack.report.evaluation_page import write_page

        questions = Questions(store=store, file=file, images=images, limit=limit)
        evaluation, folder = run_evaluation(
            answerer_at(run, overrides or []),
            questions,
            max_new_tokens=max_new_tokens,
            ranks=ranks,
            name=name,
            say=tell,
        )
        page = write_page(evaluation, folder)
    if as_json:
        print_json({"run": str(run), "folder": str(folder), **evaluation.document()})
    else:
        show(evaluation)
        say(f"answers and scores in {folder}, page {page}")
