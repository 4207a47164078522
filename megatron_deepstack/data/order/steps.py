"""From a store to what one rank needs for a step: the plan of its replica, and the pixels of the views it encodes.

Every rank looks up the sizes of all samples of the step, which decide what its replica gets, and reads the tokens of
its replica's samples. Both are small and memory-mapped. Pixels are read only by the rank that encodes them, in one
call. `prefetch` prepares a step ahead in a thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_deepstack.config.choices import Batching, Unreadable
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, TrainConfig
from megatron_deepstack.config.sizes import sample_multiple
from megatron_deepstack.data.order.mixture import Samples, sizes_of, views_of
from megatron_deepstack.data.order.sampler import Indices
from megatron_deepstack.data.order.unit_pixels import UnitPixels
from megatron_deepstack.data.order.unreadable import UnreadableSample, Where, without
from megatron_deepstack.errors import CacheError, StoreError
from megatron_deepstack.planning.batch.dealing import Balance, Deal, deal, encoder_costs_of
from megatron_deepstack.planning.batch.packing import filler, merge
from megatron_deepstack.planning.batch.sequence import expand
from megatron_deepstack.planning.batch.step_plan import StepPlan, plan_training_step
from megatron_deepstack.planning.exchange.routes import EncodeUnit, PlannedSample
from megatron_deepstack.planning.exchange.rows import context_length


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the data a rank reads: its replica, and its place within the replica."""

    dp: int
    num_replicas: int
    replica_rank: int


@dataclass(frozen=True, slots=True)
class LoadedStep:
    """A step that is ready to run on one rank."""

    step: int
    plan: StepPlan
    pixels: np.ndarray
    """uint8 (views of this rank's units, image, image, 3); views of any size are one after another in one dimension."""
    samples: Indices
    """Store indices of all samples of the step, over all replicas, int64 (N,)."""
    num_tokens: int
    """Tokens of the replica's samples, with visual tokens and without padding."""
    num_images: int
    """Images of the replica's samples."""
    members: tuple[tuple[tuple[int, ...], ...], ...]
    """Store indices of the samples in each row of each micro-batch; a pack holds several, a filler holds none."""
    balance: Balance
    """What the whole step, over all replicas, loses to padding and uneven work."""
    unreadable: tuple[UnreadableSample, ...] = ()
    """Samples whose views this rank should have read and could not; their pixels are zero."""

    def index(self, where: Where) -> int:
        """The store index of the sample at a place."""
        micro_batch, row, member = where
        return self.members[micro_batch][row][member]

    def without(self, samples: Iterable[Where]) -> LoadedStep:
        """The step with these samples left out of the loss. All ranks of the replica must leave out the same ones."""
        return replace(self, plan=without(self.plan, samples))


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a micro-batch; images and members are numbers of the store."""

    planned: PlannedSample
    images: tuple[int, ...] = ()
    members: tuple[int, ...] = ()
    """Samples of the row."""
    image_members: tuple[int, ...] = ()
    """For each image the place of its sample in `members`."""


@dataclass(frozen=True, slots=True)
class _Places:
    """Where a row's pixels and samples are in the store: what is kept of a `_Row` once it is planned."""

    images: tuple[int, ...]
    members: tuple[int, ...]
    image_members: tuple[int, ...]

    @classmethod
    def of(cls, row: _Row) -> _Places:
        return cls(row.images, row.members, row.image_members)


@dataclass(frozen=True, slots=True)
class PlannedSamples:
    """Samples of a replica with everything except their pixels."""

    plan: StepPlan
    samples: Indices
    """Store indices of all samples of the step, over all replicas, int64 (N,)."""
    num_tokens: int
    """Tokens of the samples, with visual tokens and without padding."""
    num_images: int
    rows: tuple[tuple[_Places, ...], ...]
    """By micro-batch and row."""
    balance: Balance
    """Of the whole step, over all replicas."""


class StepReader:
    """Reads steps of a store, or a mixture of stores, for one rank."""

    def __init__(
        self,
        store: Samples,
        model: ModelConfig,
        parallel: ParallelConfig,
        train: TrainConfig,
        share: Share,
        unreadable: Unreadable = Unreadable.STOP,
    ) -> None:
        self.store, self.model, self.parallel, self.train, self.share = store, model, parallel, train, share
        self.unreadable = unreadable

    def load(self, step: int) -> LoadedStep:
        """Plan and read one step.

        Args:
            step: 0-based.

        Returns:
            The step of this rank.

        Raises:
            StoreError: Pixels are missing or damaged and `unreadable` is `stop`; the message names step and sample.
            CacheError: Copies of a remote store cannot be kept on this machine, whatever `unreadable` is.
            DataError: A sample does not fit `train.seq_length`.
        """
        return self.load_samples(step, self.store.batch(self.train.seed, step, self.train.global_batch_size))

    def sample_ids(self, step: int) -> tuple[str, ...]:
        """Ids of all samples of the 0-based step `step`, over all replicas, in the order of the global batch."""
        batch = self.store.batch(self.train.seed, step, self.train.global_batch_size)
        return tuple(self.store.sample(int(index)).id for index in batch)

    def load_samples(self, step: int, samples: Indices) -> LoadedStep:
        """Plan and read a step of chosen samples; `load` chooses those of the run's order.

        Args:
            step: 0-based, for messages.
            samples: Store indices, int64 (N,), of all replicas together.

        Returns:
            The step of this rank.

        Raises:
            StoreError: As `load` does.
            DataError: As `load` does.
        """
        return self.read(step, self.plan_samples(samples))

    def plan_samples(self, samples: Indices) -> PlannedSamples:
        """Plan a step of chosen samples, without reading pixels.

        The sizes of all samples are looked up, since they decide which of them this replica gets. Everything else is
        read only of the replica's own samples.

        Args:
            samples: Store indices, int64 (N,), of all replicas together.

        Returns:
            The plan of this rank, which `read` accepts any number of times.

        Raises:
            DataError: A sample does not fit `train.seq_length`.
        """
        dealt = self._deal(samples)
        mine = [[samples[list(row)] for row in batch] for batch in dealt.replica(self.share.dp)]
        self.store.prepare(np.concatenate([row for batch in mine for row in batch]))
        rows = [[self._row(row.tolist()) for row in batch] for batch in mine]
        batches = [[row.planned for row in batch] for batch in rows]
        plan = plan_training_step(self.model, self.parallel, self.train, batches, self.share.replica_rank)
        return PlannedSamples(
            plan=plan,
            samples=samples,
            num_tokens=sum(row.planned.sequence.num_tokens for batch in rows for row in batch if row.members),
            num_images=sum(len(row.images) for batch in rows for row in batch),
            balance=dealt.balance,
            rows=tuple(tuple(_Places.of(row) for row in batch) for batch in rows),
        )

    def read(self, step: int, planned: PlannedSamples) -> LoadedStep:
        """Read the pixels of planned samples.

        Args:
            step: 0-based, for messages.
            planned: The result of `plan_samples`.

        Returns:
            The step, ready to run.

        Raises:
            StoreError: As `load` does.
        """
        pixels, unreadable = self._pixels(step, planned.rows, planned.plan.routes.units)
        return LoadedStep(
            step=step,
            plan=planned.plan,
            pixels=pixels,
            samples=planned.samples,
            balance=planned.balance,
            num_tokens=planned.num_tokens,
            num_images=planned.num_images,
            members=tuple(tuple(row.members for row in batch) for batch in planned.rows),
            unreadable=unreadable,
        )

    def _deal(self, samples: Indices) -> Deal:
        """Divide a step's samples among replicas. Raises DataError if one does not fit `train.seq_length`."""
        sizes = sizes_of(self.store, self.model, samples)
        too_long = np.flatnonzero(sizes.lengths > self.train.seq_length)
        if len(too_long) and not self.train.truncate:
            planned_sample(self.store, self.model, self.train, int(samples[too_long[0]]))
        lengths = np.minimum(sizes.lengths, self.train.seq_length)
        views = views_of(self.store, samples) if self.model.variant.traits.is_native else None
        costs = encoder_costs_of(self.model, sizes.units, views)
        return deal(lengths, costs, self.model.language, self.parallel, self.train, self.share.num_replicas)

    def _row(self, indices: Sequence[int]) -> _Row:
        """One row of some samples; a filler if there are none."""
        packed = self.train.batching is Batching.PACKED
        least = sample_multiple(self.parallel) if packed else 1
        if not indices:
            return _Row(filler(least))
        read = [self._read(index) for index in indices]
        return _merge(read, least) if packed else read[0]

    def _read(self, index: int) -> _Row:
        images = self.store.sample_images(index)
        planned = planned_sample(self.store, self.model, self.train, index)
        return _Row(planned, images, (index,), (0,) * len(images))

    def _pixels(
        self, step: int, rows: Sequence[Sequence[_Places]], units: Sequence[EncodeUnit]
    ) -> tuple[np.ndarray, tuple[UnreadableSample, ...]]:
        """The views of the units in order, read in one call, and the samples whose views could not be read."""
        requests = [(rows[unit.micro_batch][unit.sample].images[unit.image], unit.views) for unit in units]
        views = UnitPixels(self.store, self.model, requests)
        try:
            views.read()
        except StoreError:
            return views.pixels, self._read_singly(step, rows, units, views)
        return views.pixels, ()

    def _read_singly(
        self, step: int, rows: Sequence[Sequence[_Places]], units: Sequence[EncodeUnit], views: UnitPixels
    ) -> tuple[UnreadableSample, ...]:
        """Read unit by unit after an error. Raises StoreError, or sets to zero what cannot be read."""
        found: dict[Where, UnreadableSample] = {}
        for number, unit in enumerate(units):
            row = rows[unit.micro_batch][unit.sample]
            try:
                views.read_unit(number)
            except CacheError:
                raise
            except StoreError as error:
                member = row.image_members[unit.image]
                index = row.members[member]
                name = self.store.sample(index).id
                if self.unreadable is Unreadable.STOP:
                    raise StoreError(f"step {step + 1}, sample {name!r} (number {index}): {error}") from error
                where = (unit.micro_batch, unit.sample, member)
                found.setdefault(where, UnreadableSample(where, index, name, str(error)))
        return tuple(found.values())


def _merge(samples: Sequence[_Row], multiple: int) -> _Row:
    """Join samples into one packed row, each padded to a multiple of tokens."""
    return _Row(
        planned=merge([one.planned for one in samples], multiple),
        images=tuple(image for one in samples for image in one.images),
        members=tuple(index for one in samples for index in one.members),
        image_members=tuple(member for member, one in enumerate(samples) for _ in one.images),
    )


def planned_sample(store: Samples, model: ModelConfig, train: TrainConfig, index: int) -> PlannedSample:
    """Read one sample and put its visual tokens into its sequence.

    Args:
        store: What training reads.
        model: Determines how many tokens an image takes.
        train: Gives `seq_length`, and says whether longer samples are cut.
        index: Store index of the sample.

    Returns:
        The expanded sample, and the grids of its images.

    Raises:
        DataError: The sample is longer than `train.seq_length`, and `train.truncate` is off.
    """
    sample = store.sample(index)
    grids = tuple(store.grid(image) for image in sample.images)
    sequence = expand(
        sample.id,
        sample.tokens,
        sample.loss_mask,
        [context_length(model, grid) for grid in grids],
        seq_length=train.seq_length,
        truncate=train.truncate,
    )
    return PlannedSample(sequence=sequence, grids=grids)
