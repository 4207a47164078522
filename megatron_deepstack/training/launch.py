"""Training on this machine from one command."""

from __future__ import annotations

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.platform.local_ranks import launch_ranks
from megatron_deepstack.training.main import train


def launch(recipe: Recipe, *, num_ranks: int, stop_after: int | None = None) -> None:
    """Train on `num_ranks` processes of this machine and wait for them. Raises RankError if one fails."""
    launch_ranks(train, num_ranks, recipe, stop_after)
