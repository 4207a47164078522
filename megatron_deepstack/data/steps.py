"""From a store to what one rank needs of a step: the plan of its replica, and the pixels of the views it encodes.

Tokens and counts of all the replica's samples are read by each of its ranks, since they are small and memory-mapped;
pixels only by the rank that encodes them. One step is prepared ahead in a thread, so that training does not wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megatron_deepstack.config.choices import Batching
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, Recipe, TrainConfig
from megatron_deepstack.data.processor import check_store
from megatron_deepstack.data.sampler import Indices, global_batch, share_of_replica
from megatron_deepstack.data.store import Store
from megatron_deepstack.data.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import ConfigError, DataError
from megatron_deepstack.planning.packing import filler, merge, pack
from megatron_deepstack.planning.routes import PlannedSample, RankRoutes
from megatron_deepstack.planning.rows import context_length
from megatron_deepstack.planning.sequence import expand
from megatron_deepstack.planning.step_plan import StepPlan, plan_step


@dataclass(frozen=True, slots=True)
class Share:
    """Which replica and which of its ranks reads."""

    dp: int
    num_replicas: int
    replica_rank: int


@dataclass(frozen=True, slots=True)
class LoadedStep:
    """A step ready to run on one rank."""

    step: int
    plan: StepPlan
    pixels: np.ndarray
    """uint8 (views of this rank's units, image, image, 3)."""
    samples: Indices
    """Store indices of the replica's samples, (micro-batches, micro_batch_size)."""
    num_tokens: int
    """Tokens of the replica's samples, visual ones included, padding not."""
    num_images: int
    """Images of the replica's samples."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a micro-batch with its images' numbers in the store."""

    planned: PlannedSample
    images: tuple[int, ...]


class StepReader:
    """Reads steps of a store for one rank."""

    def __init__(
        self, store: Store, model: ModelConfig, parallel: ParallelConfig, train: TrainConfig, share: Share
    ) -> None:
        self.store, self.model, self.parallel, self.train, self.share = store, model, parallel, train, share
        if len(store) == 0:
            raise DataError(f"{store.root}: the store holds no samples; preprocess records whose images can be read")

    def load(self, step: int) -> LoadedStep:
        """Plan and pixels of 0-based step `step`. Raises StoreError where pixels are missing or damaged."""
        batch = global_batch(self.train.seed, step, self.train.global_batch_size, len(self.store))
        mine = share_of_replica(batch, self.share.dp, self.share.num_replicas, self.train.micro_batch_size)
        return self.load_samples(step, mine)

    def load_samples(self, step: int, samples: Indices) -> LoadedStep:
        """The same for chosen samples, (micro-batches, micro_batch_size) store indices."""
        read = [[self._read(int(i)) for i in row] for row in samples]
        packed = self.train.batching is Batching.PACKED
        rows = self._pack([one for row in read for one in row]) if packed else read
        batches = [[row.planned for row in batch] for batch in rows]
        plan = plan_step(self.model, self.parallel, batches, self.share.replica_rank, packed=packed)
        return LoadedStep(
            step=step,
            plan=plan,
            pixels=self._pixels(rows, plan.routes),
            samples=samples,
            num_tokens=sum(one.planned.sequence.length for row in read for one in row),
            num_images=sum(len(one.images) for row in read for one in row),
        )

    def _read(self, index: int) -> _Row:
        return _Row(planned_sample(self.store, self.model, self.train, index), self.store.sample_images(index))

    def _pack(self, samples: list[_Row]) -> list[list[_Row]]:
        """Packed rows, each a micro-batch of its own; fillers make up the number that interleaving asks for."""
        packs = pack([one.planned.sequence.length for one in samples], self.train.seq_length)
        rows = [
            _Row(
                merge([samples[i].planned for i in indices]),
                tuple(image for i in indices for image in samples[i].images),
            )
            for indices in packs
        ]
        multiple = self.parallel.pipeline if self.parallel.virtual_pipeline > 1 else 1
        wanted = -(-len(rows) // multiple) * multiple
        return [[row] for row in (*rows, *[_Row(filler(), ())] * (wanted - len(rows)))]

    def _pixels(self, rows: list[list[_Row]], routes: RankRoutes) -> np.ndarray:
        size = self.model.vision.image_size
        parts = [np.empty((0, size, size, 3), np.uint8)]
        for unit in routes.units:
            image = rows[unit.micro_batch][unit.sample].images[unit.image]
            parts.append(self.store.read_views(image, unit.views))
        return np.concatenate(parts)


def open_reader(recipe: Recipe, path: str | None, share: Share) -> StepReader:
    """Reader of the store at `path` for one rank, after checking that it fits the recipe.

    Raises ConfigError without a path, StoreError where the store is unusable or made for something else, DataError
    where it is empty or a sample is too long.
    """
    if path is None:
        raise ConfigError(["data.store: not set; give the folder that `preprocess` wrote"])
    store = Store.open(path, verify_checksums=recipe.data.verify_checksums)
    check_store(store, recipe.model, load_tokenizer(recipe.data.tokenizer) if recipe.data.tokenizer else None)
    check_lengths(store, recipe.model, recipe.train)
    return StepReader(store, recipe.model, recipe.parallel, recipe.train, share)


def planned_sample(store: Store, model: ModelConfig, train: TrainConfig, index: int) -> PlannedSample:
    """A stored sample, expanded. Raises DataError if it does not fit `train.seq_length`."""
    sample = store.sample(index)
    grids = tuple(store.image(image).grid for image in sample.images)
    sequence = expand(
        sample.id,
        sample.tokens,
        sample.loss_mask,
        [context_length(model, grid) for grid in grids],
        seq_length=train.seq_length,
        truncate=train.truncate,
    )
    return PlannedSample(sequence=sequence, grids=grids)


def check_lengths(store: Store, model: ModelConfig, train: TrainConfig) -> None:
    """Raise DataError, naming the first ten, if samples exceed `train.seq_length` and may not be cut."""
    if train.truncate:
        return
    contexts: dict[int, int] = {}
    too_long = []
    lengths = store.lengths()
    for index in range(len(store)):
        length = int(lengths[index])
        for image in store.sample_images(index):
            if image not in contexts:
                contexts[image] = context_length(model, store.image(image).grid)
            length += contexts[image] - 1
        if length > train.seq_length:
            too_long.append((store.sample(index).id, length))
    if too_long:
        listed = "\n".join(f"  {name}: {length} tokens" for name, length in too_long[:10])
        raise DataError(
            f"{store.root}: {len(too_long)} of {len(store)} samples exceed train.seq_length {train.seq_length}, visual "
            f"tokens included (longest {max(n for _, n in too_long)}); raise it, or set train.truncate=true:\n{listed}"
        )


class Prefetcher:
    """Iterates over steps `first` to `stop - 1`, each prepared while the one before is trained."""

    def __init__(self, reader: StepReader, first: int, stop: int) -> None:
        self.reader, self.first, self.stop = reader, first, stop

    def __iter__(self) -> Iterator[LoadedStep]:
        if self.first >= self.stop:
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
            upcoming: Future[LoadedStep] = pool.submit(self.reader.load, self.first)
            for step in range(self.first, self.stop):
                ready = upcoming.result()
                if step + 1 < self.stop:
                    upcoming = pool.submit(self.reader.load, step + 1)
                yield ready
