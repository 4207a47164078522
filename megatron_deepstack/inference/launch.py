"""Generating on this machine from one command: start the ranks, wait, print the table and the score."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.inference.main import Answer, Score, answer_store, open_questions, require_checkpoint
from megatron_deepstack.platform.local_ranks import launch_ranks

SHOWN = 20
_STOPPED = "generate: stopped on request; no answers were written. The same command begins anew"


def generate(recipe: Recipe, *, store: str | None, limit: int | None, max_new_tokens: int) -> Score:
    """Answer the questions of `store`, a folder or URL (default: `data.validation_store`), and print a table.

    Raises CheckpointError and StoreError before any rank starts, RankError if one fails.
    """
    path = store if store is not None else recipe.data.validation_store
    if path is None:
        raise ConfigError(["data.validation_store: not set; name a store of questions with --store"])
    require_checkpoint(recipe)
    open_questions(recipe, path)
    parallel = recipe.parallel
    num_ranks = parallel.tensor * parallel.context * parallel.pipeline
    answers: list[Answer] = launch_ranks(answer_store, num_ranks, recipe, path, limit, max_new_tokens, stopped=_STOPPED)
    score = Score.of(answers)
    _show(answers, score)
    return score


def _show(answers: list[Answer], score: Score) -> None:
    console = Console()
    table = Table(title=f"first {min(SHOWN, len(answers))} of {len(answers)} questions", title_justify="left")
    for heading in ("question", "answer", "expected", ""):
        table.add_column(heading, overflow="fold")
    for answer in answers[:SHOWN]:
        table.add_row(*map(Text, (answer.question, answer.answer, answer.expected, "ok" if answer.correct else "")))
    console.print(table)
    console.print(
        f"exact match {score.correct} of {score.total} = {score.correct / max(score.total, 1):.1%}; "
        f"chance (the commonest answer every time) {score.chance:.1%}",
        highlight=False,
    )
