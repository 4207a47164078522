"""`evaluate` on this machine with one command: look at the questions, start the ranks, write answers and scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_deepstack.errors import LayoutError
from megatron_deepstack.inference.answerer import Answerer
from megatron_deepstack.inference.evaluate.exam import Questions, open_exam
from megatron_deepstack.inference.evaluate.rank import evaluate_on_new_rank
from megatron_deepstack.platform.processes.local_ranks import launch_ranks
from megatron_deepstack.platform.quantity import number_of
from megatron_deepstack.scores.evaluation import Evaluation, replaced_source, require_writable, write_evaluation

_STOPPED = "evaluate: stopped on request; nothing was written, the same command starts again"


def evaluate(
    answerer: Answerer,
    questions: Questions,
    *,
    max_new_tokens: int,
    ranks: int | None = None,
    name: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Evaluation, Path]:
    """Evaluate a run's newest checkpoint, or a folder of weights. This starts the ranks.

    Args:
        answerer: The run or folder of weights.
        questions: What is asked.
        max_new_tokens: Longest answer in tokens.
        ranks: Number of processes, a multiple of those of a replica; None for one replica.
        name: Name of the evaluation; by default that of the store or file.
        say: Called with a line about what is about to be done.

    Returns:
        The evaluation, and the folder that holds its files.

    Raises:
        CheckpointError: There is no checkpoint; this and the next three are raised before any rank starts if possible.
        ConfigError: No questions or no tokenizer are named.
        LayoutError: `ranks` are no whole replicas.
        DataError: The questions or the tokenizer cannot be used, or the evaluation cannot be written.
        RankError: A rank failed.
        PreemptedError: It was asked to stop.
    """
    answerer.require_weights()
    opened = open_exam(answerer, questions, "evaluate", say)
    answerer = answerer.without_sequence_parallelism()
    num_ranks = _number_of_ranks(answerer, ranks)
    name = name or opened.name
    require_writable(answerer.recipe.run_dir, name)
    if earlier := replaced_source(answerer.recipe.run_dir, name, opened.exam.fingerprint):
        say(f"evaluate: replaces the evaluation {name} of other questions ({earlier}); --name NAME keeps both")
    say(f"evaluate: {number_of(len(opened.exam), 'question')} of {opened.source} by {number_of(num_ranks, 'rank')}")
    arguments = (answerer, opened.exam, opened.tokenizer, opened.template, max_new_tokens)
    scored, step = launch_ranks(evaluate_on_new_rank, num_ranks, *arguments, stopped=_STOPPED)
    evaluation = Evaluation(
        name=name,
        source=opened.source,
        step=step,
        fingerprint=opened.exam.fingerprint,
        answers=tuple(scored),
    )
    return evaluation, write_evaluation(answerer.recipe.run_dir, evaluation)


def _number_of_ranks(answerer: Answerer, ranks: int | None) -> int:
    parallel, replica = answerer.recipe.parallel, answerer.num_ranks
    if ranks is not None and ranks % replica:
        raise LayoutError(
            [
                f"--ranks {ranks}: no whole number of replicas of tensor {parallel.tensor} x context "
                f"{parallel.context} x pipeline {parallel.pipeline} ranks; give a multiple of {replica}"
            ]
        )
    return ranks or replica


def show(evaluation: Evaluation) -> None:
    """Print the means, of all questions and by category, to stdout."""
    console, means = Console(), evaluation.means()
    step = "" if evaluation.step is None else f", step {evaluation.step}"
    table = Table(title=f"{evaluation.name}{step}", title_justify="left")
    table.add_column("questions", overflow="fold")
    table.add_column("number", justify="right")
    for metric in means:
        table.add_column(metric.replace("_", " "), justify="right")
    for category in (None, *evaluation.categories):
        chosen = [one for one in evaluation.answers if category is None or one.category == category]
        scores = evaluation.means(category)
        shown = [f"{scores[metric]:.1%}" if metric in scores else "" for metric in means]
        table.add_row(Text("all" if category is None else category), str(len(chosen)), *shown)
    console.print(table)
    without = sum(not one.references for one in evaluation.answers)
    if without:
        console.print(f"{number_of(without, 'question')} without known answers: answered, and not scored")
    failed = [one for one in evaluation.answers if one.error is not None]
    if failed:
        console.print(Text(f"{number_of(len(failed), 'question')} not asked, counted as wrong: {failed[0].error}"))
