"""What a step consists of, for estimates: the micro-batches of one replica, from lengths of real or drawn samples.

Without a store, samples are drawn from what the recipe states (`data.expected_text_tokens`, `data.expected_images`).
With one, the sizes of its own samples are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_deepstack.config.choices import Batching, GridRule
from megatron_deepstack.config.schema import ModelConfig, Recipe
from megatron_deepstack.planning.batch.dealing import Balance, deal
from megatron_deepstack.planning.batch.sequence import padded_lengths
from megatron_deepstack.planning.exchange.image_plan import image_plan
from megatron_deepstack.planning.exchange.rows import context_length
from megatron_deepstack.planning.views import FIXED_GRID, Grid, candidate_grids

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes of the samples of one step, over all replicas."""

    lengths: Numbers
    """(N,) tokens of each sample, with visual tokens, after truncation."""
    units: Numbers
    """(N,) units that each sample gives the encoder."""
    source: str
    """Where they come from, in words."""


@dataclass(frozen=True, slots=True)
class MicroBatchLoad:
    """One micro-batch of a replica."""

    size: int
    """Samples or packs, B."""
    positions: int
    """B x S, padded."""
    squares: float
    """Sum of the squares of the lengths over which attention runs."""
    units: float


@dataclass(frozen=True, slots=True)
class StepLoad:
    """The step of the replica with the most positions."""

    micro_batches: tuple[MicroBatchLoad, ...]
    """In the order of the schedule, the most costly first."""
    rows_per_unit: Mapping[int, float]
    """For each slot the rows that it adds, by unit that is encoded."""
    tokens: int
    """Tokens of the whole step over all replicas, without padding."""
    lengths: Numbers
    """(N,) tokens of all samples."""
    total_units: int
    """Units of all samples."""
    balance: Balance
    packed: bool
    source: str

    @property
    def units(self) -> float:
        """Units of the replica."""
        return sum(one.units for one in self.micro_batches)


def drawn_shapes(recipe: Recipe) -> Shapes:
    """Draw the samples of one step as the recipe states them; always the same for the same recipe.

    Args:
        recipe: Gives the means, the model, and the size of a batch.

    Returns:
        The sizes.
    """
    data, train, model = recipe.data, recipe.train, recipe.model
    random, count = np.random.default_rng(0), train.global_batch_size
    spread = 0.75
    text = np.exp(random.normal(np.log(data.expected_text_tokens) - spread**2 / 2, spread, count)).astype(np.int64) + 1
    whole, part = divmod(data.expected_images, 1.0)
    images = int(whole) + (random.random(count) < part)
    grids = (FIXED_GRID,) if model.stacks.grid is GridRule.FIXED_2X2 else candidate_grids(model.stacks.num_crops)
    chosen = random.integers(0, len(grids), int(images.sum()))
    owner = np.repeat(np.arange(count), images)
    visual = np.array([context_length(model, grid) for grid in grids])[chosen]
    units = np.array([_num_units(model, grid) for grid in grids])[chosen]
    lengths = text + np.bincount(owner, visual, count).astype(np.int64)
    return Shapes(
        lengths=np.minimum(lengths, train.seq_length),
        units=np.bincount(owner, units, count).astype(np.int64),
        source=f"drawn, with {data.expected_images:g} image(s) and {data.expected_text_tokens} text tokens a sample",
    )


def step_load(recipe: Recipe, shapes: Shapes, num_replicas: int) -> StepLoad:
    """Divide the samples of a step as training does, and describe the replica with the most positions.

    Args:
        recipe: The recipe, whose layout has been checked for this number of replicas.
        shapes: The samples.
        num_replicas: Number of replicas.

    Returns:
        The load.
    """
    parallel, train, model = recipe.parallel, recipe.train, recipe.model
    packed = train.batching is Batching.PACKED
    dealt = deal(shapes.lengths, shapes.units, model.language, parallel, train, num_replicas)
    best: tuple[int, tuple[MicroBatchLoad, ...]] | None = None
    for mine in dealt.replicas:
        tokens = [[int(shapes.lengths[list(row)].sum()) or 1 for row in batch] for batch in mine]
        padded = padded_lengths(tokens, parallel, train.precision)
        batches = []
        for batch, length in zip(mine, padded, strict=True):
            members = shapes.lengths[[one for row in batch for one in row]].astype(np.float64)
            squares = float((members**2).sum()) if packed else len(batch) * float(length) ** 2
            units = float(shapes.units[[one for row in batch for one in row]].sum())
            batches.append(MicroBatchLoad(len(batch), len(batch) * length, squares, units))
        positions = sum(one.positions for one in batches)
        if best is None or positions > best[0]:
            best = positions, tuple(batches)
    assert best is not None
    return StepLoad(
        micro_batches=best[1],
        rows_per_unit=rows_per_unit(model),
        tokens=int(shapes.lengths.sum()),
        lengths=shapes.lengths,
        total_units=int(shapes.units.sum()),
        balance=dealt.balance,
        packed=packed,
        source=shapes.source,
    )


def rows_per_unit(model: ModelConfig) -> dict[int, float]:
    """Return the rows that each slot adds for a unit, as in an image of the most usual grid."""
    grid = FIXED_GRID
    plan = image_plan(model, grid, context_length(model, grid))
    return {one.slot: len(one.cell) / len(plan.units) for one in plan.slots}


def _num_units(model: ModelConfig, grid: Grid) -> int:
    return len(image_plan(model, grid, context_length(model, grid)).units)
