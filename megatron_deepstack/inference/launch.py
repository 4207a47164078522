"""`generate` on this machine with one command: start the ranks, wait, and return the answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.config.sizes import answering_layout
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.inference.loading import require_checkpoint
from megatron_deepstack.inference.main import answer_store, open_questions
from megatron_deepstack.platform.processes.local_ranks import launch_ranks
from megatron_deepstack.platform.quantity import number_of
from megatron_deepstack.run_folder.answers import Answer, Score, answers_file, origin_of, require_writable_answers

SHOWN = 20
_STOPPED = "generate: stopped on request; nothing was written, the same command starts again"


@dataclass(frozen=True, slots=True)
class Answered:
    """The result of `generate`."""

    store: str
    file: Path
    """The file that holds the answers."""
    answers: list[Answer]

    @property
    def score(self) -> Score:
        """The number of exact matches."""
        return Score.of(self.answers)

    def document(self) -> dict[str, Any]:
        """The result as one JSON document; `score` is null if no answer is known."""
        score = self.score
        known = {
            "correct": score.correct,
            "total": score.total,
            "exact_match": score.correct / max(score.total, 1),
            "chance": score.chance,
        }
        return {
            "store": self.store,
            "answers_file": str(self.file),
            "step": self.answers[0].step if self.answers else None,
            "fingerprint": self.answers[0].fingerprint if self.answers else None,
            "score": known if score.total else None,
            "answers": [
                {name: getattr(answer, name) for name in ("id", "question", "answer", "expected", "correct", "image")}
                for answer in self.answers
            ],
        }


def generate(
    recipe: Recipe,
    *,
    held_out: str | None,
    store: str | None,
    limit: int | None,
    max_new_tokens: int,
    say: Callable[[str], None] = lambda line: None,
) -> Answered:
    """Answer the questions of a store with the run's newest checkpoint. This starts the ranks of one replica.

    Args:
        recipe: The run's recipe, with overrides.
        held_out: The run's own `data.validation_store`, before overrides.
        store: Folder or URL of the questions; None takes `data.validation_store`.
        limit: Most questions to answer; None for all.
        max_new_tokens: Longest answer in tokens.
        say: Called with a line about what is about to be done.

    Returns:
        The answers, and the file that holds them.

    Raises:
        CheckpointError: There is no checkpoint; this and the next two are raised before any rank starts if possible.
        StoreError: The store is unusable or does not fit the run.
        ConfigError: No store or no tokenizer is named.
        RankError: A rank failed.
        PreemptedError: It was asked to stop.
    """
    path = store if store is not None else recipe.data.validation_store
    if path is None:
        raise ConfigError(["data.validation_store: not set; name a store of questions with --store"])
    require_checkpoint(recipe)
    opened, _ = open_questions(recipe, path)
    first = limit if limit is not None and limit < len(opened) else None
    file = answers_file(recipe.run_dir, path, held_out=held_out, first=first)
    require_writable_answers(file)
    recipe = replace(recipe, parallel=answering_layout(recipe.parallel))
    parallel = recipe.parallel
    num_ranks = parallel.tensor * parallel.context * parallel.pipeline
    asked, ranks = first or len(opened), "1 process" if num_ranks == 1 else f"{num_ranks} processes"
    say(f"generate: {number_of(asked, 'question')} of {path} in {ranks}; starting takes some seconds")
    arguments = (recipe, path, limit, max_new_tokens, str(file))
    answers = launch_ranks(answer_store, num_ranks, *arguments, stopped=_STOPPED)
    return Answered(store=path, file=file, answers=answers)


def show(done: Answered) -> None:
    """Print a table of the first answers, and the score, to stdout."""
    console, answers = Console(), done.answers
    table = Table(title=f"first {min(SHOWN, len(answers))} of {len(answers)} questions", title_justify="left")
    for heading in ("question", "answer", "expected", ""):
        table.add_column(heading, overflow="fold")
    for answer in answers[:SHOWN]:
        table.add_row(*map(Text, (answer.question, answer.answer, answer.expected, "ok" if answer.correct else "")))
    console.print(table)
    console.print(Text(done.score.words))
    if origin := origin_of(answers[0].step, answers[0].fingerprint) if answers else "":
        console.print(Text(origin))
    console.print(Text(f"answers in {done.file}"), soft_wrap=True)
