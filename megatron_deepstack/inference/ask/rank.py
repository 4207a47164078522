"""`ask` on one rank: the model, and questions that arrive from the process of the user until there are no more.

Rank 0 has the connection to that process. It gives each batch to all ranks, and sends back each token as it is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_deepstack.inference.answerer import Answerer
from megatron_deepstack.inference.ask.preparation import Preparation, Prepared
from megatron_deepstack.inference.ask.text import StopWords
from megatron_deepstack.inference.generate import Writing, generate_answers, score_answers
from megatron_deepstack.inference.main import MICRO_BATCH_SIZE, micro_batches
from megatron_deepstack.inference.sampling import Sampling
from megatron_deepstack.parallel.groups import create_groups
from megatron_deepstack.step.engine import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Questions that are answered together, and how."""

    questions: tuple[Prepared, ...]
    first_number: int
    """Number of the first of them among all that were asked; drawn tokens depend on it."""
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    stop_words: StopWords
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Scoring:
    """Questions with answers, whose probability is asked for."""

    questions: tuple[Prepared, ...]
    answers: tuple[tuple[int, ...], ...]
    """Token ids of each answer; at least one."""


def serve(answerer: Answerer, preparation: Preparation, connection: Connection) -> None:
    """Answer batches until None arrives. Collective over all ranks; each runs it in a process of its own.

    Rank 0 first sends that it is ready. Then it receives a `Batch`, sends for each token a list of the chosen ids, one
    per question, and at the end of the batch the answers' ids as a tuple of lists.

    Args:
        answerer: The run or folder of weights, in a layout of one replica.
        preparation: How questions were prepared.
        connection: Rank 0's connection to the user's process; other ranks do not use it.
    """
    from megatron_deepstack.platform.compute.megatron_cpu import adapt_megatron
    from megatron_deepstack.platform.processes.process_group import join, leave

    adapt_megatron()
    join()
    recipe = answerer.recipe
    engine, _ = answerer.engine(create_groups(recipe.parallel, recipe.train.seed))
    if dist.get_rank() == 0:
        connection.send("ready")
    while True:
        batch = _next(connection)
        if batch is None:
            break
        if isinstance(batch, Scoring):
            answers: Sequence[object] = score_batch(engine, preparation, batch)
        else:
            answers = answer_batch(engine, preparation, batch, connection if dist.get_rank() == 0 else None)
        if dist.get_rank() == 0:
            connection.send(tuple(answers))
    leave()


def answer_batch(
    engine: Engine, preparation: Preparation, batch: Batch, connection: Connection | None = None
) -> list[list[int]]:
    """Answer questions of any number. Collective over the replica.

    Args:
        engine: The model.
        preparation: How the questions were prepared.
        batch: The questions, the same on all ranks.
        connection: Where tokens are sent as they are chosen; None to send none.

    Returns:
        Token ids of each answer.
    """
    answers: list[list[int]] = []
    size = MICRO_BATCH_SIZE * engine.parallel.pipeline
    for first in range(0, len(batch.questions), size):
        group = batch.questions[first : first + size]

        def told(number: int, chosen: np.ndarray, count: int = len(group)) -> None:
            if connection is not None:
                connection.send(chosen.reshape(-1)[:count].tolist())

        answers += _answer_group(engine, preparation, batch, group, batch.first_number + first, told)
    return answers


def _answer_group(
    engine: Engine, preparation: Preparation, batch: Batch, group: Sequence[Prepared], number: int, told: Any
) -> list[list[int]]:
    starts = np.cumsum([0, *(len(prepared.pictures) for prepared in group)])
    questions = [
        preparation.question(prepared, number + index, int(starts[index])) for index, prepared in enumerate(group)
    ]
    writing = Writing(
        max_new_tokens=min(batch.max_new_tokens, max(prepared.room for prepared in group)),
        stop_ids=batch.stop_ids,
        has_ended=batch.stop_words,
        sampling=batch.sampling,
        told=told,
    )
    batches = micro_batches(questions, engine.parallel)
    answered = generate_answers(engine, preparation.views(group), batches, writing)
    flat = [ids for micro_batch in answered for ids in micro_batch][: len(group)]
    return [ids[: prepared.room] for ids, prepared in zip(flat, group, strict=True)]


def score_batch(engine: Engine, preparation: Preparation, scoring: Scoring) -> list[tuple[float, bool]]:
    """Probabilities of given answers. Collective over the replica.

    Args:
        engine: The model.
        preparation: How the questions were prepared.
        scoring: Questions and answers, the same on all ranks.

    Returns:
        For each the sum of its tokens' log-probabilities, and whether each token is the most likely one.
    """
    found: list[tuple[float, bool]] = []
    size = MICRO_BATCH_SIZE * engine.parallel.pipeline
    for first in range(0, len(scoring.questions), size):
        group, answers = scoring.questions[first : first + size], scoring.answers[first : first + size]
        starts = np.cumsum([0, *(len(prepared.pictures) for prepared in group)])
        questions = [preparation.question(one, index, int(starts[index])) for index, one in enumerate(group)]
        batches = micro_batches(questions, engine.parallel)
        found += score_answers(engine, preparation.views(group), batches, answers)
    return found


def _next(connection: Connection) -> Batch | Scoring | None:
    """The next batch on every rank. Collective over all ranks."""
    box: list[Any] = [connection.recv() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]
