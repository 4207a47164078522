"""Answers in any layout (pipeline, tensor and context parallel), token by token.

Questions form micro-batches. Views are encoded and rows are routed once; then a decoder gives the logits of the next
token of all answers, until each has ended. Padding on the right of a prompt has no effect under a causal mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import torch

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.inference.decoding import PREFILL_TOKENS, CachedDecoder, Decoder, RecomputingDecoder
from megatron_deepstack.inference.questions import Question, Views, plan_question
from megatron_deepstack.inference.sampling import GREEDY, Sampling
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.parallel.reduce import gather_last_dim, share_from_last_stage
from megatron_deepstack.planning.batch.sequence import padded_length
from megatron_deepstack.planning.batch.step_plan import StepPlan, plan_step
from megatron_deepstack.platform.compute.device import local_device
from megatron_deepstack.step.engine import Engine
from megatron_deepstack.step.train_step import VisualPass


class Method(StrEnum):
    """How the next token is computed. Both give the same text."""

    CACHED = "cached"
    RECOMPUTED = "recomputed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Writing:
    """How answers are written."""

    max_new_tokens: int
    """Longest answer."""
    stop_ids: Sequence[int]
    """Token ids that end an answer; at least one."""
    has_ended: Callable[[Sequence[int]], bool] = lambda ids: False
    """Whether an answer of these token ids has ended without one of `stop_ids`, for stop words."""
    sampling: Sampling = GREEDY
    method: Method = Method.CACHED
    prefill_tokens: int = PREFILL_TOKENS
    """Most tokens of a micro-batch's prompts that are read at once."""
    told: Callable[[int, np.ndarray], None] = field(default=lambda number, tokens: None)
    """Called after each token with the number of tokens up to now and the newest ones, int64 (M, B)."""


def generate_answers(
    engine: Engine, views: Views, questions: Sequence[Sequence[Question]], writing: Writing
) -> list[list[list[int]]]:
    """Answer questions. Collective over the replica: all its ranks must call this with the same questions.

    Args:
        engine: The model, ready for forward passes.
        views: The source of the questions' images.
        questions: Micro-batches of one replica, all of the same size.
        writing: How answers are written.

    Returns:
        Token ids of each answer before the first of `stop_ids`, by micro-batch and place, on every rank.
    """
    lengths, decoder = _decoder(engine, views, questions, writing)
    numbers = np.array([[question.index for question in batch] for batch in questions])
    answers: list[list[list[int]]] = [[[] for _ in batch] for batch in questions]
    running, stops = np.ones(lengths.shape, bool), set(writing.stop_ids)
    with torch.no_grad():
        logits = decoder.first()
        for step in range(writing.max_new_tokens):
            chosen = _choose(logits, writing.sampling, numbers, step, engine.groups)
            writing.told(step + 1, chosen)
            for m, b in zip(*np.nonzero(running), strict=True):
                token = int(chosen[m, b])
                if token not in stops:
                    answers[m][b].append(token)
                running[m, b] = token not in stops and not writing.has_ended(answers[m][b])
            if not running.any() or step + 1 == writing.max_new_tokens:
                break
            logits = decoder.after(chosen)
    return answers


def score_answers(
    engine: Engine, views: Views, questions: Sequence[Sequence[Question]], answers: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """How likely given answers are. Collective over the replica.

    Args:
        engine: The model, ready for forward passes.
        views: The source of the questions' images.
        questions: Micro-batches of one replica, all of the same size.
        answers: Token ids of the answer to each of the first questions; the questions behind them are padding.

    Returns:
        For each answer the sum of its tokens' log-probabilities, and whether each token is the most likely one.
    """
    longest = max(len(ids) for ids in answers)
    _, decoder = _decoder(engine, views, questions, Writing(max_new_tokens=longest, stop_ids=()))
    shape = (len(questions), len(questions[0]))
    given = np.zeros((*shape, longest), np.int64)
    counted = np.zeros(given.shape, bool)
    for place, ids in enumerate(answers):
        given[np.unravel_index(place, shape)][: len(ids)] = ids
        counted[np.unravel_index(place, shape)][: len(ids)] = True
    total, greedy = np.zeros(shape), np.ones(shape, bool)
    with torch.no_grad():
        logits = decoder.first()
        for token in range(longest):
            likely, best = _likelihood(logits, given[..., token], engine.groups)
            now = counted[..., token]
            total += np.where(now, likely, 0.0)
            greedy &= ~now | best
            if token + 1 < longest:
                logits = decoder.after(given[..., token])
    pairs = zip(total.reshape(-1).tolist(), greedy.reshape(-1).tolist(), strict=True)
    return list(pairs)[: len(answers)]


def _likelihood(logits: list[torch.Tensor], given: np.ndarray, groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities (M, B) of given tokens, and whether they are the most likely; equal on all ranks."""
    both = torch.zeros(2, *given.shape, dtype=torch.float64, device=local_device())
    for m, local_BV in enumerate(logits):
        full_BV = gather_last_dim(local_BV, groups.decoder.tp)
        tokens_B1 = torch.from_numpy(given[m]).to(full_BV.device)[:, None]
        both[0, m] = torch.log_softmax(full_BV.double(), dim=-1).gather(1, tokens_B1)[:, 0]
        both[1, m] = full_BV.float().argmax(dim=-1) == tokens_B1[:, 0]
    likely, best = share_from_last_stage(both, groups).cpu().numpy()
    return likely, best == 1.0


def _decoder(
    engine: Engine, views: Views, questions: Sequence[Sequence[Question]], writing: Writing
) -> tuple[np.ndarray, Decoder]:
    """The prompts' lengths (M, B), and a decoder that has read nothing yet, but has encoded the images."""
    room = writing.max_new_tokens if writing.method is Method.RECOMPUTED else 0
    planned = [[plan_question(q, views, engine.model_config, room) for q in batch] for batch in questions]
    longest = padded_length([one.sequence.length for batch in planned for one in batch], engine.parallel)
    plan = plan_step(
        engine.model_config,
        engine.parallel,
        planned,
        engine.groups.replica_rank,
        seq_lengths=(longest,) * len(planned),
    )
    lengths = np.array([[s.sequence.length - room for s in batch] for batch in planned])
    pixels = _pixels(engine.model_config, views, questions, plan)
    visual = VisualPass(engine, plan, torch.from_numpy(pixels))
    if writing.method is Method.RECOMPUTED:
        return lengths, RecomputingDecoder(engine, plan, visual, lengths)
    return lengths, CachedDecoder(engine, plan, visual, lengths, writing.max_new_tokens, writing.prefill_tokens)


def _choose(
    logits: list[torch.Tensor], sampling: Sampling, numbers: np.ndarray, token: int, groups: Groups
) -> np.ndarray:
    """int64 (M, B): the next tokens, equal on all ranks of the replica; `logits` are the last stage's."""
    chosen = torch.zeros(numbers.shape, dtype=torch.int64, device=local_device())
    for m, local_BV in enumerate(logits):
        chosen[m] = sampling.choose(gather_last_dim(local_BV, groups.decoder.tp), numbers[m], token)
    return share_from_last_stage(chosen, groups).cpu().numpy()


def _pixels(model: ModelConfig, views: Views, questions: Sequence[Sequence[Question]], plan: StepPlan) -> np.ndarray:
    """The views that this rank encodes: uint8 (views, S, S, 3), or (bytes,) if they have any size."""
    if model.variant.traits.is_native:
        chosen = [questions[unit.micro_batch][unit.sample].images[unit.image] for unit in plan.routes.units]
        return views.read_flat(chosen)
    parts = [np.empty((0, views.crop_size, views.crop_size, 3), np.uint8)]
    for unit in plan.routes.units:
        image = questions[unit.micro_batch][unit.sample].images[unit.image]
        parts.append(views.read_views(image, unit.views))
    return np.concatenate(parts)
