"""`generate` on one rank: load a run's newest checkpoint, answer a store's questions, score the answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.data.images.processor import check_store
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.url.cache import CacheConfig
from megatron_deepstack.data.text.conversation import stop_ids
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.inference.generate import Method, Writing, generate_answers
from megatron_deepstack.inference.loading import load_newest
from megatron_deepstack.inference.questions import Question, read_question
from megatron_deepstack.parallel.groups import create_groups
from megatron_deepstack.platform.progress import WorkProgress
from megatron_deepstack.run_folder.answers import Answer, write_answers
from megatron_deepstack.step.engine import Engine

MICRO_BATCH_SIZE = 8


def answer_store(recipe: Recipe, store_path: str, limit: int | None, max_new_tokens: int, file: str) -> list[Answer]:
    """Answer a store's questions with the newest whole checkpoint of `recipe.run_dir`. Collective over all ranks.

    Args:
        recipe: The run's recipe. There is one replica only: the number of ranks is tensor x context x pipeline.
        store_path: Folder or URL of the store.
        limit: Most questions to answer, from the first one; None for all.
        max_new_tokens: Longest answer in tokens.
        file: Where rank 0 writes the answers.

    Returns:
        The answers, in the store's order, on every rank.

    Raises:
        StoreError: The store is not usable.
        CheckpointError: The checkpoint is not usable.
        DataError: The file cannot be written.
    """
    from megatron_deepstack.platform.compute.megatron_cpu import adapt_megatron
    from megatron_deepstack.platform.processes.process_group import join, leave

    adapt_megatron()
    join()
    store, tokenizer = open_questions(recipe, store_path)
    engine, step = load_newest(recipe, create_groups(recipe.parallel, recipe.train.seed))
    answers = answer_questions(recipe, engine, store, tokenizer, store_path, limit, max_new_tokens, step=step)
    if engine.groups.replica_rank == 0:
        write_answers(Path(file), answers)
    leave()
    return answers


def answer_questions(
    recipe: Recipe,
    engine: Engine,
    store: Store,
    tokenizer: Tokenizer,
    store_path: str,
    limit: int | None,
    max_new_tokens: int,
    method: Method = Method.CACHED,
    step: int | None = None,
) -> list[Answer]:
    """Answer the questions of an open store. Collective over the replica.

    Args:
        recipe: The run's recipe.
        engine: The model, ready for forward passes.
        store: The open store.
        tokenizer: The run's tokenizer.
        store_path: Folder or URL of the store, which is recorded with each answer.
        limit: Most questions to answer, from the first one; None for all.
        max_new_tokens: Longest answer in tokens.
        method: How tokens are computed; the text is the same.
        step: Training steps of the model, which are recorded with each answer.

    Returns:
        The answers, in the store's order, on every rank.
    """
    count = min(limit or len(store), len(store))
    questions = [read_question(store, index, tokenizer) for index in range(count)]
    stops = stop_ids(store.attributes.tokenizer["template"], tokenizer)
    tokens: list[list[int]] = []
    with WorkProgress("generate", count, "questions", quiet=engine.groups.replica_rank != 0) as progress:
        for first in range(0, count, MICRO_BATCH_SIZE * recipe.parallel.pipeline):
            group = questions[first : first + MICRO_BATCH_SIZE * recipe.parallel.pipeline]
            batches = micro_batches(group, recipe.parallel)

            def told(number: int, _: np.ndarray, first: int = first, size: int = len(group)) -> None:
                progress.at(first + size * number / max_new_tokens)

            writing = Writing(max_new_tokens=max_new_tokens, stop_ids=stops, method=method, told=told)
            answered = generate_answers(engine, store, batches, writing)
            tokens += [row for batch in answered for row in batch][: len(group)]
            progress.at(len(tokens))
    place, fingerprint = str(Location.parse(store_path).absolute()), store.plan_hash
    texts = [tokenizer.decode(ids).strip() for ids in tokens]
    return [
        Answer(
            id=question.id,
            question=question.text,
            answer=text,
            expected=question.expected,
            correct=text == question.expected,
            store=place,
            image=question.images[0] if question.images else None,
            step=step,
            fingerprint=fingerprint,
        )
        for question, text in zip(questions, texts, strict=True)
    ]


def open_questions(recipe: Recipe, store_path: str) -> tuple[Store, Tokenizer]:
    """Open a store of questions and the run's tokenizer, and check that they fit.

    Args:
        recipe: The run's recipe.
        store_path: Folder or URL of the store.

    Returns:
        The store and the tokenizer.

    Raises:
        ConfigError: The recipe names no tokenizer.
        StoreError: The store is unusable, or does not fit the model or the tokenizer.
    """
    if recipe.data.tokenizer is None:
        raise ConfigError(["data.tokenizer: not set; `generate` needs it to write its answers"])
    cache = CacheConfig.of(recipe.data)
    store, tokenizer = Store.open(store_path, cache=cache), load_tokenizer(recipe.data.tokenizer)
    check_store(store, recipe.model, tokenizer)
    return store, tokenizer


def micro_batches(questions: list[Question], parallel: ParallelConfig) -> list[list[Question]]:
    """Equal micro-batches. The last question is repeated to fill them, and up to a multiple of pp when interleaved.

    Args:
        questions: At least one question.
        parallel: The layout.

    Returns:
        The micro-batches, whose questions are in order.
    """
    size = min(MICRO_BATCH_SIZE, len(questions))
    number = -(-len(questions) // size)
    if parallel.virtual_pipeline > 1:
        number = -(-number // parallel.pipeline) * parallel.pipeline
    filled = questions + [questions[-1]] * (number * size - len(questions))
    return [filled[m * size : (m + 1) * size] for m in range(number)]
