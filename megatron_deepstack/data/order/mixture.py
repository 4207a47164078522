"""Several stores as one: samples and images are numbered through, and each store gives samples by its weight.

Which store a sample comes from, and which of its samples it is, is a pure function of seed and position (`sampler`). So
resuming needs only the step, and no layout of ranks changes the order. A store with fewer samples than its share
repeats sooner, in epochs of its own.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby
from math import prod
from typing import Protocol

import numpy as np

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.data.order.sampler import Indices, StoreStream, mixed_batch
from megatron_deepstack.data.store.lengths import SampleSizes, sample_sizes, sample_views
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.stored import Sample, StoredImage
from megatron_deepstack.errors import StoreError
from megatron_deepstack.planning.views import ImageShape


class Samples(Protocol):
    """What training reads: a store, or a mixture of stores. Samples and images are numbered from 0 over all stores."""

    @property
    def name(self) -> str:
        """The name for messages: what is read."""

    @property
    def plan_hash(self) -> str:
        """A hash of the samples and of their order; a run's checkpoints are bound to it."""

    @property
    def tokenizer_sha256(self) -> str:
        """Fingerprint of the tokenizer whose ids the samples hold."""

    def __len__(self) -> int: ...

    def batch(self, seed: int, step: int, batch_size: int) -> Indices:
        """The samples of one step, over all replicas: a pure function of its arguments.

        Args:
            seed: The run's seed.
            step: 0-based.
            batch_size: Samples of a step over all replicas.

        Returns:
            int64 (batch_size,), numbers of samples.
        """

    def prepare(self, samples: Indices) -> None:
        """Fetch what these samples need and this node does not have yet; see `Store.prepare`."""

    def sample(self, index: int) -> Sample:
        """The sample with the number `index`."""

    def sample_images(self, index: int) -> tuple[int, ...]:
        """The numbers of a sample's images."""

    def grid(self, image: int) -> ImageShape:
        """The grid of an image's crops, or the patches of its one view."""

    def image(self, index: int) -> StoredImage:
        """The image with the number `index`."""

    def read_many(self, requests: Sequence[tuple[int, Sequence[int]]], out: np.ndarray | None = None) -> np.ndarray:
        """Read views of many images, all of one size; see `Store.read_many`.

        Args:
            requests: Pairs of an image and the numbers of its views.
            out: uint8 (views of all requests, S, S, 3) that receives them; a new array if None.

        Returns:
            uint8 (views of all requests, S, S, 3), one request after the other.

        Raises:
            StoreError: A view cannot be read, or is damaged.
        """

    def view_shape(self, image: int) -> tuple[int, int, int, int]:
        """The shape of an image's one view, see `Store.view_shape`."""

    def read_flat(self, images: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Read views of any size, one after another without gaps; see `Store.read_flat`.

        Args:
            images: Numbers of images.
            out: uint8 (bytes of all views,) that receives them; a new array if None.

        Returns:
            uint8 (bytes of all views,).

        Raises:
            StoreError: A view cannot be read, or is damaged.
        """


class Mixture:
    """Stores mixed by weight. Safe in threads and worker processes, as its stores are."""

    def __init__(self, stores: Sequence[Store], weights: Sequence[float] | None) -> None:
        """Mix stores.

        Args:
            stores: At least one open store.
            weights: One positive number for each store, in any unit; None takes the stores' numbers of samples.

        Raises:
            StoreError: The stores were made with different tokenizers.
        """
        assert stores
        self.stores = tuple(stores)
        self.weights = tuple(weights or [float(len(store)) for store in stores])
        self._first_sample = [0, *np.cumsum([len(store) for store in stores]).tolist()]
        self._first_image = [0, *np.cumsum([store.num_images for store in stores]).tolist()]
        self._streams: tuple[int, list[StoreStream]] | None = None
        self._check_tokenizers()

    @property
    def name(self) -> str:
        """The stores' paths."""
        return "mixture of " + ", ".join(store.name for store in self.stores)

    @property
    def plan_hash(self) -> str:
        """sha256 of the stores' plan hashes and their shares."""
        total = sum(self.weights)
        parts = [[store.plan_hash, weight / total] for store, weight in zip(self.stores, self.weights, strict=True)]
        return hashlib.sha256(json.dumps({"mixture": parts}).encode()).hexdigest()

    @property
    def tokenizer_sha256(self) -> str:
        """The fingerprint of the tokenizer, which is the same for all stores."""
        return self.stores[0].tokenizer_sha256

    def __len__(self) -> int:
        return int(self._first_sample[-1])

    def batch(self, seed: int, step: int, batch_size: int) -> Indices:
        """The samples of one step: each store gives its share, in a shuffled order (`sampler.mixed_batch`).

        Args:
            seed: The run's seed.
            step: 0-based.
            batch_size: Samples of a step over all replicas.

        Returns:
            int64 (batch_size,), numbers of samples, counted over all stores.
        """
        streams = self._streams
        if streams is None or streams[0] != seed:
            streams = self._streams = seed, [StoreStream(seed, k, len(store)) for k, store in enumerate(self.stores)]
        chosen, numbers = mixed_batch(seed, step, batch_size, self.weights)
        out = np.empty(batch_size, np.int64)
        for k, stream in enumerate(streams[1]):
            here = chosen == k
            if here.any():
                out[here] = self._first_sample[k] + stream.take(numbers[here])
        return out

    def prepare(self, samples: Indices) -> None:
        """Fetch what these samples need and this node does not have yet; see `Store.prepare`."""
        which = np.searchsorted(self._first_sample, samples, side="right") - 1
        for k in np.unique(which).tolist():
            self.stores[k].prepare(samples[which == k] - self._first_sample[k])

    def sample(self, index: int) -> Sample:
        """The sample `index`, with its images numbered over all stores. Raises IndexError outside 0..len-1."""
        store, number = self._find(index, self._first_sample, "sample")
        sample = self.stores[store].sample(number)
        return Sample(sample.id, sample.tokens, sample.loss_mask, self.sample_images(index))

    def sample_images(self, index: int) -> tuple[int, ...]:
        """The images of sample `index`, numbered over all stores."""
        store, number = self._find(index, self._first_sample, "sample")
        return tuple(self._first_image[store] + image for image in self.stores[store].sample_images(number))

    def grid(self, image: int) -> ImageShape:
        """The grid of an image's crops, or the patches of its one view."""
        store, number = self._find(image, self._first_image, "image")
        return self.stores[store].grid(number)

    def image(self, index: int) -> StoredImage:
        """Image `index`; its `start` is a row of its own store."""
        store, number = self._find(index, self._first_image, "image")
        return self.stores[store].image(number)

    def read_many(self, requests: Sequence[tuple[int, Sequence[int]]], out: np.ndarray | None = None) -> np.ndarray:
        """Read views of many images, see `Store.read_many`; those of one store are read together.

        Args:
            requests: Pairs of an image, counted over all stores, and the numbers of its views.
            out: uint8 (views of all requests, S, S, 3) that receives them; a new array if None.

        Returns:
            uint8 (views of all requests, S, S, 3), one request after the other.

        Raises:
            StoreError: A view cannot be read, or is damaged.
        """
        places = np.cumsum([0, *(len(views) for _, views in requests)])
        if out is None:
            out = np.empty((int(places[-1]), *self.stores[0].pixels.slot_shape), np.uint8)
        found = [self._find(image, self._first_image, "image") for image, _ in requests]
        for k in sorted({store for store, _ in found}):
            mine = [n for n, (store, _) in enumerate(found) if store == k]
            rows = np.concatenate([np.arange(places[n], places[n + 1]) for n in mine])
            out[rows] = self.stores[k].read_many([(found[n][1], requests[n][1]) for n in mine])
        return out

    def sizes(self, model: ModelConfig, samples: Indices) -> SampleSizes:
        """Sizes of chosen samples, from index arrays alone; see `lengths.sample_sizes`.

        Args:
            model: Determines how many tokens an image takes, and how many units are encoded for it.
            samples: int64 (N,), numbers of samples, counted over all stores.

        Returns:
            The sizes.
        """
        which = np.searchsorted(self._first_sample, samples, side="right") - 1
        found = SampleSizes(*np.empty((3, len(samples)), np.int64))
        for k in np.unique(which).tolist():
            here = which == k
            part = sample_sizes(self.stores[k], model, samples[here] - self._first_sample[k])
            found.lengths[here], found.units[here], found.visual[here] = part.lengths, part.units, part.visual
        return found

    def views(self, samples: Indices) -> Indices:
        """Views of any size of samples, see `sample_views`; in the order of samples."""
        which = np.searchsorted(self._first_sample, samples, side="right") - 1
        parts = [np.empty((0, 4), np.int64)]
        for k in np.unique(which).tolist():
            here = np.flatnonzero(which == k)
            found = sample_views(self.stores[k], samples[here] - self._first_sample[k])
            parts.append(np.column_stack([here[found[:, 0]], found[:, 1:]]))
        together = np.concatenate(parts)
        return together[np.argsort(together[:, 0], kind="stable")]

    def view_shape(self, image: int) -> tuple[int, int, int, int]:
        """Frames, height and width in pixels, and 3, of the one view of an image, which may have any size."""
        store, number = self._find(image, self._first_image, "image")
        return self.stores[store].view_shape(number)

    def read_flat(self, images: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Views of any size, see `Store.read_flat`; those of one store are read together.

        Args:
            images: Numbers of images, counted over all stores.
            out: uint8 (bytes of all views,) that receives them; a new array if None.

        Returns:
            uint8 (bytes of all views,).

        Raises:
            StoreError: A view cannot be read, or is damaged.
        """
        ends = np.cumsum([0, *(prod(self.view_shape(image)) for image in images)]).tolist()
        if out is None:
            out = np.empty(ends[-1], np.uint8)
        found = [self._find(image, self._first_image, "image") for image in images]
        for store, group in groupby(range(len(found)), key=lambda place: found[place][0]):
            places = list(group)
            numbers = [found[place][1] for place in places]
            self.stores[store].read_flat(numbers, out[ends[places[0]] : ends[places[-1] + 1]])
        return out

    def _find(self, index: int, firsts: list[int], noun: str) -> tuple[int, int]:
        """The store, and the number within that store."""
        if not 0 <= index < firsts[-1]:
            raise IndexError(f"{self.name}: {noun} {index} was asked for; there are {firsts[-1]}")
        store = bisect_right(firsts, index) - 1
        return store, int(index) - firsts[store]

    def _check_tokenizers(self) -> None:
        first = self.stores[0]
        for store in self.stores[1:]:
            if store.tokenizer_sha256 != first.tokenizer_sha256:
                raise StoreError(
                    f"data.stores: {first.name} was made with tokenizer {first.tokenizer_sha256[:12]}..., {store.name} "
                    f"with {store.tokenizer_sha256[:12]}...; preprocess one of them again with the other's tokenizer"
                )


def sizes_of(samples: Samples, model: ModelConfig, numbers: Indices) -> SampleSizes:
    """Sizes of chosen samples of a store or a mixture, from index arrays alone.

    Args:
        samples: What training reads.
        model: Determines how many tokens an image takes, and how many units are encoded for it.
        numbers: int64 (N,), numbers of samples.

    Returns:
        The sizes.
    """
    if isinstance(samples, Mixture):
        return samples.sizes(model, numbers)
    assert isinstance(samples, Store)
    return sample_sizes(samples, model, numbers)


def views_of(samples: Samples, numbers: Indices) -> Indices:
    """Views of any size of chosen samples of a store or a mixture, from index arrays alone.

    Args:
        samples: What training reads.
        numbers: int64 (N,), numbers of samples.

    Returns:
        int64 (I, 4), see `sample_views`.
    """
    if isinstance(samples, Mixture):
        return samples.views(numbers)
    assert isinstance(samples, Store)
    return sample_views(samples, numbers)
