"""Training on this machine from one command."""

from __future__ import annotations

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.steps import Share, open_reader, open_training_reader
from megatron_deepstack.platform.local_ranks import launch_ranks
from megatron_deepstack.training.main import train


def launch(recipe: Recipe, *, num_ranks: int, stop_after: int | None = None) -> None:
    """Train on `num_ranks` processes of this machine and wait for them. Raises RankError if one fails.

    What can be found wrong with stores and checkpoints without ranks is found before they start.
    """
    alone = Share(dp=0, num_replicas=1, replica_rank=0)
    open_training_reader(recipe, alone)
    if recipe.train.validation_interval and recipe.data.validation_store is not None:
        open_reader(recipe, recipe.data.validation_store, alone)
    launch_ranks(train, num_ranks, recipe, stop_after)
