"""Saving as the loop sees it: begin, poll, finish."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.optimizer import ChainedOptimizer

from megatron_deepstack.checkpoint.save_load import save
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.model.build import RankModel


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is whole on disk."""

    step: int
    """Steps done."""
    path: Path
    stall_seconds: float
    """Time that training was blocked for it on this rank."""
    write_seconds: float
    """Time from its beginning until it was whole."""


class Saver:
    """Checkpoints of a run. Every method is collective over all ranks."""

    def __init__(
        self, recipe: Recipe, model: RankModel, optimizer: ChainedOptimizer, facts: Mapping[str, Any]
    ) -> None:
        self.recipe, self.model, self.optimizer, self.facts = recipe, model, optimizer, facts
        self._stall_seconds = 0.0
        self._saved: Saved | None = None

    def begin(self, step: int) -> None:
        """Start the checkpoint after `step` steps, once one in flight is whole."""
        start = time.perf_counter()
        path = save(
            self.recipe.run_dir,
            step,
            self.model,
            self.optimizer,
            self.facts,
            recipe_to_yaml(self.recipe),
            self.recipe.checkpoint.keep,
        )
        seconds = time.perf_counter() - start
        self._stall_seconds += seconds
        self._saved = Saved(step=step, path=path, stall_seconds=seconds, write_seconds=seconds)

    def poll(self) -> Saved | None:
        """Go on with a save in flight without waiting; called in every step. The checkpoint if it is whole now.

        Raises CheckpointError on every rank if one could not write.
        """
        saved, self._saved = self._saved, None
        return saved

    def finish(self) -> Saved | None:
        """Wait for a save in flight; the checkpoint that is whole now, if there was one. Raises as `poll` does."""
        return self.poll()

    def take_stall_seconds(self) -> float:
        """Time that training was blocked for saving since the last call."""
        seconds, self._stall_seconds = self._stall_seconds, 0.0
        return seconds
