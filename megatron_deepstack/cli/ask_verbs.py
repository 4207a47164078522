"""The verb that asks a model: pictures and a question, a file of questions, or a chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_deepstack.cli.app import app, say, tell
from megatron_deepstack.cli.output import JsonOption, print_json, stdout_for_results
from megatron_deepstack.config.constraints import PathKind
from megatron_deepstack.errors import ConfigError, DataError


@app.command()
def ask(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run with a checkpoint, or a folder that `export` wrote.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PICTURE... QUESTION",
            help="Pictures, and last the question in quotes; changes to the recipe may stand among them.",
        ),
    ] = None,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="The question; then all words are pictures.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="File of questions, JSON lines: question_id, image, text.")] = None,
    images: Annotated[
        str | None,
        PathKind.LOCATION,
        typer.Option(help="Folder or URL of the pictures of --file; by default the file's own folder."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token, above 0 draws.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw only from the most likely tokens that reach this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be given again.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a model about pictures: one question, a file of questions, or a chat if no question is given.

    A picture becomes exactly the pixels that the run's store would hold, and the question is written by the store's
    template; an exported folder describes both. In a chat each line is a question; /picture FILE adds a picture.
    """
    from megatron_deepstack.inference.ask.words import understand
    from megatron_deepstack.run_folder.asked import check_asked

    understood = understand(words or [], question)
    if file is not None and (understood.question is not None or understood.pictures):
        raise ConfigError([f"--file {file}: found a question or pictures beside it, expected only one of both"])
    if as_json and file is None and understood.question is None:
        raise ConfigError(["--json: a chat has no document; give a question or --file"])
    check_asked(run, understood.overrides)
    with stdout_for_results(as_json):
        from megatron_deepstack.inference.answerer import answerer_at
        from megatron_deepstack.inference.ask.launch import Manner
        from megatron_deepstack.inference.ask.session import Session
        from megatron_deepstack.inference.sampling import Sampling

        drawn = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        manner = Manner(max_new_tokens=max_new_tokens, sampling=drawn, stop=tuple(filter(None, stop or ())))
        session = Session.of(answerer_at(run, understood.overrides), manner, tell)
        if file is not None:
            replies = session.ask_file(file, images, None if as_json else say)
        elif understood.question is not None:
            replies = [session.ask_one(understood.question, understood.pictures, None if as_json else _write)]
        else:
            session.chat(_lines(), understood.pictures, _write, tell)
            return
    if as_json:
        print_json({"model": str(run), "answers": [session.document(reply) for reply in replies]})
    _require_answers([reply.error for reply in replies], file)


def _require_answers(errors: Sequence[str | None], file: Path | None) -> None:
    """Raise DataError, and so exit with its code, if questions of a file could not be asked."""
    failed = [error for error in errors if error is not None]
    if failed:
        raise DataError(f"{file}: {len(failed)} of {len(errors)} questions could not be asked: {failed[0]}")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _lines() -> Iterator[str]:
    """Lines of stdin, with a prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            _write("> ")
        line: Any = sys.stdin.readline()
        if not line:
            return
        yield line
