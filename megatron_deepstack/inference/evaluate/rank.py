"""An evaluation on one rank: its replica's share of the questions, answered and scored, and all shares put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_deepstack.data.text.conversation import stop_ids
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.inference.answerer import Answerer
from megatron_deepstack.inference.evaluate.exam import Exam, Taken
from megatron_deepstack.inference.generate import Writing, generate_answers
from megatron_deepstack.inference.main import MICRO_BATCH_SIZE, micro_batches
from megatron_deepstack.parallel.groups import create_groups
from megatron_deepstack.parallel.reduce import sum_over_group
from megatron_deepstack.platform.compute.device import local_device
from megatron_deepstack.platform.progress import WorkProgress
from megatron_deepstack.scores.evaluation import Scored
from megatron_deepstack.step.engine import Engine


def evaluate_on_new_rank(
    answerer: Answerer, exam: Exam, tokenizer: Tokenizer, template: str, max_new_tokens: int
) -> tuple[list[Scored], int | None]:
    """Load a model and evaluate it. Collective over all ranks, each in a process of its own.

    Args:
        answerer: The run or folder of weights; the ranks form whole replicas of its layout.
        exam: The questions.
        tokenizer: The run's tokenizer.
        template: The template by which they are written.
        max_new_tokens: Longest answer in tokens.

    Returns:
        All scored answers, in the exam's order, and the training steps of the model if they are known, on every rank.
    """
    from megatron_deepstack.platform.compute.megatron_cpu import adapt_megatron
    from megatron_deepstack.platform.processes.process_group import join, leave

    adapt_megatron()
    join()
    engine, step = answerer.engine(create_groups(answerer.recipe.parallel, answerer.recipe.train.seed))
    with WorkProgress("evaluate", len(exam), "questions", quiet=dist.get_rank() != 0) as progress:
        scored = evaluate_exam(engine, exam, tokenizer, template, max_new_tokens, progress.at)
    assert scored is not None, "nobody has asked to leave questions out"
    leave()
    return scored, step


def evaluate_exam(
    engine: Engine,
    exam: Exam,
    tokenizer: Tokenizer,
    template: str,
    max_new_tokens: int,
    progress: Callable[[float], None] = lambda done: None,
    asked: Callable[[], bool] | None = None,
) -> list[Scored] | None:
    """Answer and score an exam. Replicas divide the questions. Collective over all ranks.

    Args:
        engine: The model, ready for forward passes.
        exam: The questions.
        tokenizer: The run's tokenizer.
        template: The template by which they are written.
        max_new_tokens: Longest answer in tokens.
        progress: Told after each token how many questions of the whole are done, as far as this replica knows.
        asked: Whether this rank was asked to leave the rest out; its replica decides together before each group of
            questions. None if nobody asks.

    Returns:
        All scored answers, in the exam's order, on every rank; None on every rank where a replica has left any out.
    """
    replicas, stops = engine.groups.axes.dp, stop_ids(template, tokenizer)
    share = range(engine.groups.place.dp, len(exam), replicas)
    size = MICRO_BATCH_SIZE * engine.parallel.pipeline
    mine: list[tuple[int, Scored]] = []
    for first in range(0, len(share), size):
        if asked is not None and _any_of_replica(engine, asked()):
            return _of_all_replicas(None)
        taken, views = exam.take(share[first : first + size])
        askable = [one for one in taken if one.question is not None]
        done, longest = len(mine), _longest(askable, max_new_tokens)

        def told(number: int, _: np.ndarray, done: int = done, size: int = len(taken), most: int = longest) -> None:
            progress(min((done + size * number / most) * replicas, len(exam)))

        writing = Writing(max_new_tokens=longest, stop_ids=stops, told=told)
        texts = iter(_texts(engine, views, askable, writing, tokenizer))
        mine += [(one.number, exam.scored(one, "" if one.question is None else next(texts))) for one in taken]
        progress(min(len(mine) * replicas, len(exam)))
    return _of_all_replicas(mine if engine.groups.replica_rank == 0 else [])


def _longest(askable: Sequence[Taken], max_new_tokens: int) -> int:
    return min(max_new_tokens, max((one.room or max_new_tokens for one in askable), default=1))


def _texts(engine: Engine, views: Any, askable: Sequence[Taken], writing: Writing, tokenizer: Tokenizer) -> list[str]:
    """The answers of some questions, on every rank of the replica."""
    if not askable:
        return []
    questions = [one.question for one in askable if one.question is not None]
    batches = micro_batches(questions, engine.parallel)
    answered = [ids for batch in generate_answers(engine, views, batches, writing) for ids in batch]
    return [
        tokenizer.decode(ids[: one.room]).strip() for ids, one in zip(answered[: len(questions)], askable, strict=True)
    ]


def _any_of_replica(engine: Engine, flag: bool) -> bool:
    """Whether a flag is True on any rank of the replica. Collective over the replica."""
    found = torch.tensor([float(flag)], device=local_device())
    return bool(sum_over_group(found, engine.groups.replica).item() > 0)


def _of_all_replicas(mine: list[tuple[int, Scored]] | None) -> list[Scored] | None:
    """The answers of all replicas, in order of their numbers; None if a rank has none to give. Collective over all."""
    gathered: list[list[tuple[int, Scored]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    numbered: dict[int, Scored] = {}
    for share in gathered:
        if share is None:
            return None
        numbered |= dict(share)
    return [numbered[number] for number in np.sort(list(numbered))]
