"""Loss on held-out samples, in the run's own layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_deepstack.data.order.steps import StepReader, open_reader
from megatron_deepstack.step.train_step import VisualPass
from megatron_deepstack.training.session import Session, share_of


@dataclass(frozen=True, slots=True)
class Validation:
    """Evaluates at intervals over the whole batches of the held-out store."""

    session: Session
    reader: StepReader
    interval: int

    @classmethod
    def of(cls, session: Session) -> Validation | None:
        """The recipe's validation, or None where it asks for none. Raises StoreError if the store does not fit."""
        recipe = session.recipe
        if not recipe.train.validation_interval or recipe.data.validation_store is None:
            return None
        reader = open_reader(recipe, recipe.data.validation_store, share_of(session.groups))
        return cls(session, reader, recipe.train.validation_interval)

    def due(self, step: int) -> bool:
        """Whether to evaluate after `step` steps."""
        return step % self.interval == 0 or step == self.session.recipe.train.steps

    def loss(self, progress: Callable[[str], None]) -> float:
        """Mean loss per target over the held-out samples, in store order. Collective over all ranks.

        `progress` is told of every batch. Samples are dealt as in training; what does not fill a last batch is left
        out, but for a store smaller than one batch, whose samples repeat.
        """
        train, share = self.session.recipe.train, self.reader.share
        num_samples = len(self.reader.store)
        total, num_tokens = 0.0, 0
        num_batches = max(num_samples // train.global_batch_size, 1)
        for batch in range(num_batches):
            progress(f"validation batch {batch + 1} of {num_batches}")
            order = (batch * train.global_batch_size + np.arange(train.global_batch_size)) % num_samples
            mine = order.reshape(-1, share.num_replicas, train.micro_batch_size)[:, share.dp]
            loaded = self.reader.load_samples(batch, mine)
            rows = VisualPass(self.session.engine, loaded.plan, torch.from_numpy(loaded.pixels))
            loss = rows.losses(loaded.plan)
            total, num_tokens = total + loss.total, num_tokens + loss.num_tokens
        return total / num_tokens if num_tokens else 0.0
