"""What a step consists of, for estimates: the micro-batches of one replica, from sizes of real or drawn samples.

Without a store, samples are drawn from what the recipe states (`drawn`). With one, the sizes of its own samples are
taken. Views of one size are described by their number. Views of any size are described one by one, since attention is
quadratic in each of them, and since no view is divided between ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_deepstack.config.choices import Batching
from megatron_deepstack.config.schema import ModelConfig, Recipe
from megatron_deepstack.config.traits.variants import ViewLayout
from megatron_deepstack.planning.batch.dealing import Balance, deal, encoder_costs_of
from megatron_deepstack.planning.batch.sequence import row_lengths
from megatron_deepstack.planning.budget.cost import EncoderWork, encoder_flops
from megatron_deepstack.planning.check import model_ranks
from megatron_deepstack.planning.exchange.dealing import deal_by_cost
from megatron_deepstack.planning.exchange.image_plan import image_plan
from megatron_deepstack.planning.exchange.rows import context_length
from megatron_deepstack.planning.slots import EMBEDDING, decoder_slots
from megatron_deepstack.planning.views import FIXED_GRID, ImageShape, read_tile_grids, tile_grid

Numbers = npt.NDArray[np.int64]
_PHOTO = (640, 480)
"""Width and height in pixels of a usual image."""


@dataclass(frozen=True, slots=True)
class Views:
    """Views of any size, in the order of the samples that have them; arrays have one entry per view."""

    owner: Numbers
    """(I,) the sample that has it."""
    frames: Numbers
    """(I,) patches in time, each of which attends to itself alone."""
    height: Numbers
    """(I,) patches of one frame from top to bottom."""
    width: Numbers
    """(I,) patches of one frame from left to right."""

    @property
    def frame(self) -> Numbers:
        """(I,) patches of one frame."""
        return self.height * self.width


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes of the samples of one step, over all replicas."""

    lengths: Numbers
    """(N,) tokens of each sample, with visual tokens, after truncation."""
    units: Numbers
    """(N,) units that each sample gives the encoder: views, or images whose views are encoded together, or visual
    tokens if views have any size."""
    source: str
    """Where they come from, in words."""
    views: Views | None = None
    """All views, if they have any size."""

    targets: Numbers | None = None
    """(N,) tokens of each sample whose prediction is part of the loss; None if all may be."""

    def encoder_costs(self, model: ModelConfig) -> npt.NDArray[np.float64]:
        """(N,) what each sample costs the encoder, as training deals samples to replicas by it."""
        views = self.views
        rows = None if views is None else np.column_stack([views.owner, views.frames, views.height, views.width])
        return encoder_costs_of(model, self.units, rows)


@dataclass(frozen=True, slots=True)
class MicroBatchLoad:
    """One micro-batch of a replica."""

    size: int
    """Samples or packs, B."""
    positions: int
    """B x S, padded."""
    squares: float
    """Sum of the squares of the lengths over which attention runs."""
    work: EncoderWork
    """Its images."""
    targets: int
    """Positions whose prediction is part of the loss, the only ones that the output layer computes."""


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
    total_work: EncoderWork
    """Images of all samples of the step."""
    share: EncoderWork
    """What the rank of the replica that has most to encode encodes, if all ranks do."""
    balance: Balance
    packed: bool
    source: str

    @property
    def units(self) -> float:
        """Units of the replica."""
        return sum(one.work.units for one in self.micro_batches)


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
    dealt = deal(shapes.lengths, shapes.encoder_costs(model), model.language, parallel, train, num_replicas)
    sizes = _Sizes(model, shapes)
    best: tuple[int, tuple[MicroBatchLoad, ...], list[int]] | None = None
    for mine in dealt.replicas:
        tokens = [[int(shapes.lengths[list(row)].sum()) or 1 for row in batch] for batch in mine]
        padded = row_lengths(tokens, parallel, train)
        batches, samples = [], list[int]()
        for batch, length in zip(mine, padded, strict=True):
            members = [one for row in batch for one in row]
            lengths = shapes.lengths[members].astype(np.float64)
            squares = float((lengths**2).sum()) if packed else len(batch) * float(length) ** 2
            positions = len(batch) * length
            targets = positions if shapes.targets is None else int(shapes.targets[members].sum())
            batches.append(MicroBatchLoad(len(batch), positions, squares, sizes.of(members), targets))
            samples += members
        positions = sum(one.positions for one in batches)
        if best is None or positions > best[0]:
            best = positions, tuple(batches), samples
    assert best is not None
    return StepLoad(
        micro_batches=best[1],
        rows_per_unit=rows_per_unit(model),
        tokens=int(shapes.lengths.sum()),
        lengths=shapes.lengths,
        total_work=sizes.of(range(len(shapes.lengths))),
        share=sizes.share(best[2], model_ranks(parallel)),
        balance=dealt.balance,
        packed=packed,
        source=shapes.source,
    )


class _Sizes:
    """What the encoder has to do for samples."""

    def __init__(self, model: ModelConfig, shapes: Shapes) -> None:
        self.model, self.shapes = model, shapes
        if shapes.views is not None:
            views, count = shapes.views, len(shapes.lengths)
            weights = [np.ones(len(views.owner)), views.frames * views.frame, views.frames * views.frame**2.0]
            self.sums = np.stack([np.bincount(views.owner, one, count) for one in weights])

    def of(self, samples: Sequence[int]) -> EncoderWork:
        """Everything of some samples."""
        units = float(self.shapes.units[list(samples)].sum())
        if self.shapes.views is None:
            return EncoderWork.of_units(self.model, units)
        return EncoderWork(units, *self.sums[:, list(samples)].sum(1).tolist())

    def share(self, samples: Sequence[int], num_ranks: int) -> EncoderWork:
        """The share of the rank that has most to encode of some samples; views are dealt as in training."""
        views = self.shapes.views
        if views is None:
            units = int(self.shapes.units[list(samples)].sum())
            return EncoderWork.of_units(self.model, -(-units // num_ranks))
        merged, here = self.model.vision.merge_size**2, np.flatnonzero(np.isin(views.owner, list(samples)))
        works = [
            EncoderWork(frames * patches / merged, 1.0, frames * patches, frames * patches**2.0)
            for frames, patches in zip(views.frames[here].tolist(), views.frame[here].tolist(), strict=True)
        ]
        costs = [sum(encoder_flops(self.model, work)) for work in works]
        dealt = deal_by_cost(costs, [1] * len(costs), num_ranks)
        rank_of = np.searchsorted(dealt.bounds, dealt.first_unit, side="right") - 1
        busiest = int(np.bincount(rank_of, costs, num_ranks).argmax())
        return _together(work for work, rank in zip(works, rank_of.tolist(), strict=True) if rank == busiest)


def _together(works: Iterable[EncoderWork]) -> EncoderWork:
    numbers = np.array([(one.units, one.views, one.patches, one.squares) for one in works]).reshape(-1, 4)
    return EncoderWork(*numbers.sum(0).tolist())


def rows_per_unit(model: ModelConfig) -> dict[int, float]:
    """Return the rows that each slot adds for a unit: of a token that is merged, or in an image of the usual grid."""
    if model.variant.traits.is_native:
        return dict.fromkeys((EMBEDDING, *decoder_slots(model)), 1.0)
    shape = usual_shape(model)
    plan = image_plan(model, shape, context_length(model, shape))
    return {one.slot: len(one.cell) / len(plan.units) for one in plan.slots}


def usual_shape(model: ModelConfig) -> ImageShape:
    """Return the shape of a usual image, for models whose views have one size: two by two crops, or a photo's tiles."""
    if model.variant.traits.views is ViewLayout.TILES:
        return tile_grid(*_PHOTO, model.vision.image_size, read_tile_grids(model.vision.tile_grids))
    return FIXED_GRID
