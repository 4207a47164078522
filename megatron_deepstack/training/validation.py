"""Loss on held-out samples, in the run's own layout: the same batches each time, prepared ahead in a thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch

from megatron_deepstack.data.order.prefetch import Prefetcher
from megatron_deepstack.data.order.steps import LoadedStep, PlannedSamples, StepReader
from megatron_deepstack.step.train_step import held_out_loss
from megatron_deepstack.step.work import untimed
from megatron_deepstack.training.session import Session

_KEPT_PLANS: Final = 16
"""Batches whose plans are kept from one evaluation to the next: 12 MB each for 128 samples of one view and four stacks.
Later batches are planned again each time, during the forward pass of the batch before."""


@dataclass(slots=True)
class HeldOutBatches:
    """The whole batches of a held-out store, in store order, as this rank's replica sees them."""

    reader: StepReader
    _plans: dict[int, PlannedSamples] = field(default_factory=dict)

    def __len__(self) -> int:
        """Batches; one for a store smaller than a batch, whose samples repeat."""
        return max(len(self.reader.store) // self.reader.train.global_batch_size, 1)

    def load(self, step: int) -> LoadedStep:
        """The 0-based batch. Raises StoreError where its pixels cannot be read."""
        planned = self._plans.get(step)
        if planned is None:
            planned = self.reader.plan_samples(self._samples(step))
            if len(self._plans) < _KEPT_PLANS:
                self._plans[step] = planned
        return self.reader.read(step, planned)

    def _samples(self, batch: int) -> np.ndarray:
        """int64 (global batch size,): store indices."""
        size = self.reader.train.global_batch_size
        return (batch * size + np.arange(size)) % len(self.reader.store)


@dataclass(frozen=True, slots=True)
class Validation:
    """Evaluates at intervals over the whole batches of the held-out store."""

    session: Session
    batches: HeldOutBatches
    interval: int

    @classmethod
    def of(cls, session: Session) -> Validation | None:
        """The recipe's validation.

        Args:
            session: The run, whose held-out store is open where the recipe evaluates.

        Returns:
            None where the recipe asks for none.
        """
        reader = session.beginning.held_out
        if reader is None:
            return None
        return cls(session, HeldOutBatches(reader), session.recipe.train.validation_interval)

    def due(self, step: int) -> bool:
        """Whether to evaluate after `step` steps."""
        return step % self.interval == 0 or step == self.session.recipe.train.steps

    def loss(self, progress: Callable[[str], None], left: Callable[[], bool]) -> float | None:
        """Mean loss per target over the held-out samples, in store order. Collective over all ranks.

        What does not fill a last batch is left out, except for a store smaller than one batch, whose samples repeat.

        Args:
            progress: Told of every batch.
            left: Asked before every batch, by all ranks together, whether the run is to end without the rest.

        Returns:
            The mean; None where no held-out sample has a target, or where the rest was left out.

        Raises:
            StoreError: A sample cannot be read; on the rank that reads it.
        """
        total, num_tokens = 0.0, 0
        for loaded in Prefetcher(self.batches, 0, len(self.batches)):
            if left():
                return None
            progress(f"validation batch {loaded.step + 1} of {len(self.batches)}")
            with untimed(self.session.engine.model.config):
                loss = held_out_loss(self.session.engine, loaded.plan, torch.from_numpy(loaded.pixels))
            total, num_tokens = total + loss.total, num_tokens + loss.num_tokens
        return total / num_tokens if num_tokens else None
