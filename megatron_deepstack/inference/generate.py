"""Greedy answers in any layout (pipeline, tensor and context parallel), by the same forward pass as in training.

Questions form micro-batches whose sequences have space for the answer from the start. Views are encoded and rows are
routed once; then each forward-only schedule adds one token to every answer. Padding on the right has no effect under a
causal mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.inference.questions import Question, plan_question
from megatron_deepstack.parallel.context import gather_sequence
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.parallel.reduce import gather_last_dim, share_from_last_stage
from megatron_deepstack.planning.batch.step_plan import StepPlan, plan_step
from megatron_deepstack.platform.compute.device import local_device
from megatron_deepstack.step.engine import Engine
from megatron_deepstack.step.train_step import VisualPass


def generate_answers(
    engine: Engine,
    store: Store,
    questions: Sequence[Sequence[Question]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    progress: Callable[[float], None] = lambda share: None,
) -> list[list[list[int]]]:
    """Answer questions. Collective over the replica: all its ranks must call this with the same questions.

    Args:
        engine: The model, ready for forward passes.
        store: The store of the questions.
        questions: Micro-batches of one replica, all of the same size.
        stop_ids: Token ids that end an answer; at least one.
        max_new_tokens: Longest answer.
        progress: Called after each token with the share of the work that is done, 0 to 1.

    Returns:
        Token ids of each answer before the first of `stop_ids`, by micro-batch and place, on every rank.
    """
    model, place = engine.model_config, engine.groups
    planned = [[plan_question(q, store, model, max_new_tokens) for q in batch] for batch in questions]
    plan = plan_step(model, engine.parallel, planned, place.replica_rank)
    lengths = np.array([[s.sequence.length - max_new_tokens for s in batch] for batch in planned])
    tokens = [batch.copy() for batch in plan.tokens]
    answers = np.full((*lengths.shape, max_new_tokens), stop_ids[0], np.int64)
    running = np.ones(lengths.shape, bool)
    with torch.no_grad():
        visual = VisualPass(engine, plan, torch.from_numpy(_pixels(store, questions, plan)))
        for step in range(max_new_tokens):
            logits = visual.logits(replace(plan, tokens=tuple(tokens)))
            chosen = _choose(logits, lengths + step - 1, engine.groups)
            progress((step + 1) / max_new_tokens)
            answers[..., step] = np.where(running, chosen, stop_ids[0])
            running &= ~np.isin(chosen, stop_ids)
            if not running.any():
                break
            for m, b in np.ndindex(*lengths.shape):
                tokens[m][b, lengths[m, b] + step] = chosen[m, b]
    return [[_until(row, stop_ids) for row in batch] for batch in answers]


def _until(row: np.ndarray, stop_ids: Sequence[int]) -> list[int]:
    ends = np.flatnonzero(np.isin(row, stop_ids))
    return row[: ends[0] if len(ends) else len(row)].tolist()  # type: ignore[no-any-return]


def _choose(logits: list[torch.Tensor], positions: np.ndarray, groups: Groups) -> np.ndarray:
    """The most likely token at `positions` (M, B), equal on all ranks of the replica; `logits` are the last stage's."""
    chosen = torch.zeros(positions.shape, dtype=torch.int64, device=local_device())
    for m, local_BSV in enumerate(logits):
        full_BSV = gather_sequence(local_BSV.transpose(0, 1), groups.decoder.cp).transpose(0, 1)
        rows = torch.arange(full_BSV.shape[0])
        local_BV = full_BSV[rows, torch.from_numpy(positions[m])]
        chosen[m] = gather_last_dim(local_BV, groups.decoder.tp).float().argmax(dim=-1)
    return share_from_last_stage(chosen, groups).cpu().numpy()


def _pixels(store: Store, questions: Sequence[Sequence[Question]], plan: StepPlan) -> np.ndarray:
    parts = [np.empty((0, store.crop_size, store.crop_size, 3), np.uint8)]
    for unit in plan.routes.units:
        image = questions[unit.micro_batch][unit.sample].images[unit.image]
        parts.append(store.read_views(image, unit.views))
    return np.concatenate(parts)
