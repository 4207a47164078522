"""Sizes of the samples of a step of real data, for estimates before a run; only index arrays are read."""

from __future__ import annotations

import numpy as np

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.order.mixture import sizes_of
from megatron_deepstack.data.order.opening import known_store, open_training_reader
from megatron_deepstack.data.order.steps import Share, StepReader
from megatron_deepstack.planning.budget.load import Shapes


def stored_shapes(recipe: Recipe) -> Shapes:
    """Look up the samples of the first step of a recipe whose stores are there.

    Args:
        recipe: The recipe.

    Returns:
        Their sizes.

    Raises:
        DeepStackError: A store is missing or unfinished.
    """
    alone = Share(dp=0, num_replicas=1, replica_rank=0)
    return shapes_of_step(open_training_reader(recipe, alone, known_store), 0)


def shapes_of_step(reader: StepReader, step: int) -> Shapes:
    """Look up the sizes of the samples of one step, over all replicas.

    Args:
        reader: Any rank's reader; its share does not matter.
        step: 0-based.

    Returns:
        Tokens of each sample, at most `train.seq_length`, and its units for the encoder.
    """
    train = reader.train
    samples = reader.store.batch(train.seed, step, train.global_batch_size)
    lengths, units = sizes_of(reader.store, reader.model, samples)
    return Shapes(np.minimum(lengths, train.seq_length), units, f"step {step + 1} of {reader.store.name}")
