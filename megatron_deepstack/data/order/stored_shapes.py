"""Sizes of the samples of a step of real data, for estimates before a run; only index arrays are read."""

from __future__ import annotations

from typing import Final

import numpy as np

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.order.mixture import Samples, sizes_of, views_of
from megatron_deepstack.data.order.opening import known_store, open_training_reader
from megatron_deepstack.data.order.sampler import Indices
from megatron_deepstack.data.order.steps import Share, StepReader
from megatron_deepstack.planning.budget.load import Shapes, Views

_COUNTED: Final = 256
"""Samples whose targets are counted one by one, which reads their masks."""


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
    sizes = sizes_of(reader.store, reader.model, samples)
    views = None
    if reader.model.variant.traits.is_native:
        views = Views(*views_of(reader.store, samples).T)
    return Shapes(
        lengths=np.minimum(sizes.lengths, train.seq_length),
        units=sizes.units,
        visual=np.minimum(sizes.visual, train.seq_length),
        source=f"step {step + 1} of {reader.store.name}",
        views=views,
        targets=np.minimum(_targets(reader.store, samples, sizes.lengths), train.seq_length),
    )


def _targets(store: Samples, samples: Indices, lengths: Indices) -> Indices:
    """Count the targets of samples; of a large batch the first ones are counted, and the others have the same share."""
    counted = np.array([int(store.sample(int(one)).loss_mask.sum()) for one in samples[:_COUNTED]], np.int64)
    share = counted.sum() / max(int(lengths[:_COUNTED].sum()), 1)
    return np.concatenate([counted, np.round(lengths[_COUNTED:] * share).astype(np.int64)])
