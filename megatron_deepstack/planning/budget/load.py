"""What a step consists of, for estimates: the micro-batches of one replica, from sizes of real or drawn samples.

Without a store, samples are drawn from what the recipe states (`drawn`). With one, the sizes of its own samples are
taken. Views of one size are described by their number. Views of any size are described one by one, since attention is
quadratic in each of them, and since no view is divided between ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, Recipe, TrainConfig
from megatron_deepstack.config.traits.variants import ViewLayout
from megatron_deepstack.planning.batch.dealing import Balance, Dealing, encoder_costs_of
from megatron_deepstack.planning.budget.cost import EncoderWork, encoder_flops
from megatron_deepstack.planning.check import model_ranks
from megatron_deepstack.planning.exchange.dealing import deal_by_cost
from megatron_deepstack.planning.exchange.image_plan import image_plan
from megatron_deepstack.planning.exchange.rows import context_length
from megatron_deepstack.planning.slots import EMBEDDING, decoder_slots
from megatron_deepstack.planning.views import FIXED_GRID, ImageShape, read_tile_grids, tile_grid

Numbers = npt.NDArray[np.int64]
Costs = npt.NDArray[np.float64]
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
    visual: Numbers
    """(N,) visual tokens of each sample, the positions to which rows are added, after truncation."""
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


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatches:
    """The micro-batches of a replica in the order of the schedule, the most costly first; M of them."""

    size: int
    """Samples or packs of each, B."""
    positions: Numbers
    """(M,) B x S, padded."""
    squares: Costs
    """(M,) sums of the squares of the lengths over which attention runs."""
    targets: Numbers
    """(M,) positions whose prediction is part of the loss, the only ones that the output layer computes."""
    visual: Numbers
    """(M,) visual tokens, to each of which every slot adds a row."""
    work: tuple[EncoderWork, ...]
    """The images of each."""

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, slots=True, eq=False)
class StepLoad:
    """The step of the replica with the most positions."""

    micro_batches: MicroBatches
    rows_per_unit: Mapping[int, float]
    """For each slot the rows that it adds, by unit that is encoded."""
    tokens: int
    """Tokens of the whole step over all replicas, without padding."""
    token_squares: int
    """Sum of the squares of the tokens of each sample of the step."""
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
        return sum(one.units for one in self.micro_batches.work)


class StepLoads:
    """The loads of the same samples under many layouts; what several of them share is computed once."""

    def __init__(self, model: ModelConfig, train: TrainConfig, shapes: Shapes) -> None:
        self.model, self.train, self.shapes = model, train, shapes
        self.sizes, self.rows_per_unit = _Sizes(model, shapes), rows_per_unit(model)
        self.dealing = Dealing(shapes.lengths, shapes.encoder_costs(model), model.language, train)
        self.total_work = self.sizes.of(np.arange(len(shapes.lengths)))
        self._described: dict[bytes, tuple[MicroBatches, Numbers]] = {}
        self._shares: dict[tuple[bytes, int], EncoderWork] = {}

    def of(self, parallel: ParallelConfig, num_replicas: int) -> StepLoad:
        """Divide the samples as training does, and describe the replica with the most positions.

        Args:
            parallel: A layout, which has been checked for this number of replicas.
            num_replicas: Number of replicas.

        Returns:
            The load.
        """
        dealt = self.dealing.deal(parallel, num_replicas)
        replica = int(dealt.lengths.sum(1).argmax())
        samples, places = dealt.members(replica)
        padded = dealt.lengths[replica]
        key = b"".join(one.tobytes() for one in (samples, places, padded))
        if key not in self._described:
            self._described[key] = self._describe(samples, places, padded, dealt.packed), samples
        ranks = model_ranks(parallel)
        if (key, ranks) not in self._shares:
            self._shares[key, ranks] = self.sizes.share(samples, ranks)
        return StepLoad(
            micro_batches=self._described[key][0],
            rows_per_unit=self.rows_per_unit,
            tokens=int(self.shapes.lengths.sum()),
            token_squares=int((self.shapes.lengths**2).sum()),
            total_work=self.total_work,
            share=self._shares[key, ranks],
            balance=dealt.balance,
            packed=dealt.packed,
            source=self.shapes.source,
        )

    def _describe(self, samples: Numbers, places: Numbers, padded: Numbers, packed: bool) -> MicroBatches:
        """Describe the micro-batches of a replica from its samples, their places and the padded lengths."""
        count, size = len(padded), 1 if packed else self.train.micro_batch_size
        positions, lengths = size * padded, self.shapes.lengths[samples].astype(np.float64)
        squares: Costs = size * padded.astype(np.float64) ** 2
        if packed:
            squares = np.bincount(places, lengths**2, count).astype(np.float64)
        targets = positions
        if self.shapes.targets is not None:
            targets = np.bincount(places, self.shapes.targets[samples], count).astype(np.int64)
        visual = np.bincount(places, self.shapes.visual[samples], count).astype(np.int64)
        work = tuple(self.sizes.by_place(samples, places, count))
        return MicroBatches(size, positions, squares, targets, visual, work)


def step_load(recipe: Recipe, shapes: Shapes, num_replicas: int) -> StepLoad:
    """Divide the samples of a step as training does, and describe the replica with the most positions.

    Args:
        recipe: The recipe, whose layout has been checked for this number of replicas.
        shapes: The samples.
        num_replicas: Number of replicas.

    Returns:
        The load.
    """
    return StepLoads(recipe.model, recipe.train, shapes).of(recipe.parallel, num_replicas)


class _Sizes:
    """What the encoder has to do for samples."""

    def __init__(self, model: ModelConfig, shapes: Shapes) -> None:
        self.model, self.shapes = model, shapes
        if shapes.views is not None:
            views, count = shapes.views, len(shapes.lengths)
            weights = [np.ones(len(views.owner)), views.frames * views.frame, views.frames * views.frame**2.0]
            self.sums = np.stack([np.bincount(views.owner, one, count) for one in weights])

    def of(self, samples: Numbers) -> EncoderWork:
        """Everything of some samples."""
        return next(self.by_place(samples, np.zeros(len(samples), np.int64), 1))

    def by_place(self, samples: Numbers, places: Numbers, count: int) -> Iterator[EncoderWork]:
        """What each of `count` micro-batches has of the samples at their places in it."""
        units = np.bincount(places, self.shapes.units[samples], count)
        if self.shapes.views is None:
            yield from (EncoderWork.of_units(self.model, one) for one in units.tolist())
            return
        sums = [np.bincount(places, one[samples], count).tolist() for one in self.sums]
        yield from (EncoderWork(*one) for one in zip(units.tolist(), *sums, strict=True))

    def share(self, samples: Numbers, num_ranks: int) -> EncoderWork:
        """The share of the rank that has most to encode of some samples; views are dealt as in training."""
        views = self.shapes.views
        if views is None:
            return EncoderWork.of_units(self.model, -(-int(self.shapes.units[samples].sum()) // num_ranks))
        here = np.flatnonzero(np.isin(views.owner, samples))
        frames, patches = views.frames[here], views.frame[here]
        units = frames * patches / self.model.vision.merge_size**2
        numbers = np.column_stack([units, np.ones(len(here)), frames * patches, frames * patches**2.0])
        kinds, kind_of = np.unique(numbers, axis=0, return_inverse=True)
        costs = np.array([sum(encoder_flops(self.model, EncoderWork(*one))) for one in kinds.tolist()], np.float64)
        costs = costs[kind_of.reshape(-1)]
        dealt = deal_by_cost(costs.tolist(), [1] * len(costs), num_ranks)
        rank_of = np.searchsorted(dealt.bounds, dealt.first_unit, side="right") - 1
        busiest = int(np.bincount(rank_of, costs, num_ranks).argmax())
        return EncoderWork(*numbers[rank_of == busiest].sum(0).tolist())


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
