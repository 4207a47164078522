"""Reading a store: samples from memory-mapped index arrays, views directly from the shards.

Neighbouring views are read with one `preadv` into the caller's array. Shard indices are cached, requests for many
images are read in the order of the shards, and each view's crc32c is checked (0.06 ms for the five of a sample).
zarr-python reads the same store with equal results (tested), but many times slower (`tools/bench_reader.py`), and it
returns zeros for a missing chunk; here that is a StoreError naming image and shard. The reader holds no threads and no
descriptors that a fork or a pickle could break: a copy in another process opens its own. For a store at a URL, `remote`
copies the small index arrays once and views as they are read, and `remote_array` does so with blocks of the large index
arrays.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.order.sampler import Indices, global_batch
from megatron_deepstack.data.store.agreement import check_counts
from megatron_deepstack.data.store.attributes import StoreAttributes, finished_attributes, read_document
from megatron_deepstack.data.store.blocks import from_blocks
from megatron_deepstack.data.store.checked_slots import CheckedSlots, ImageNames
from megatron_deepstack.data.store.index import ArrayReader, IndexReader, read_pixels_shape
from megatron_deepstack.data.store.schema import (
    MIXED_VERSION,
    VERSION,
    ImageStatus,
    PixelsShape,
    SlotsShape,
    index_names,
    num_blocks,
)
from megatron_deepstack.data.store.shards import LocalShards, Shards
from megatron_deepstack.data.store.stored import Sample, StoredImage
from megatron_deepstack.data.store.url.cache import BoundedFolder, CacheConfig
from megatron_deepstack.data.store.url.remote import RemoteShards, copy_index
from megatron_deepstack.data.store.url.remote_array import BY_BLOCKS, RemoteArray, side_by_side
from megatron_deepstack.errors import StoreError
from megatron_deepstack.planning.views import ImageShape, ViewGrid, ViewLayout, stored_shape

_REMAKE: Final = "The store was changed or is damaged: preprocess again."
_FETCH: Final = (
    "The copy of {location} in {folder} is damaged, or the store itself: delete that folder, and it is fetched again; "
    "if that does not help, preprocess again."
)

_MOST_FLAT_BYTES: Final = 64 << 20
"""Bytes of views that `read_flat` holds beside its result."""


class Store:
    """A finished store, open for reading. Safe in threads and worker processes; it pickles as its path."""

    def __init__(
        self,
        location: Location,
        attributes: StoreAttributes,
        pixels: SlotsShape,
        index: dict[str, ArrayReader],
        shards: Shards,
        *,
        verify_checksums: bool,
        cache: CacheConfig,
    ) -> None:
        self.location = location
        self.attributes = attributes
        self.pixels = pixels
        self.verify_checksums = verify_checksums
        self._index = index
        self._cache = cache
        checksums = index["images/crc32c"] if verify_checksums else None
        self._names = ImageNames(location, index, "view" if attributes.version == VERSION else "block")
        self._slots = CheckedSlots(shards, checksums, self._names)

    @classmethod
    def open(
        cls, path: str | Path | Location, *, verify_checksums: bool = True, cache: CacheConfig | None = None
    ) -> Store:
        """Open a store. Pixels are not checked here but when they are read.

        Args:
            path: Folder or URL.
            verify_checksums: Whether the crc32c of each view is checked when it is read.
            cache: Where copies are kept, for a URL only.

        Returns:
            The open store.

        Raises:
            StoreError: There is no store, its preprocessing has not finished, it has the format of another version, or
                an index array is damaged.
            LocationError: A URL cannot be reached.
        """
        location = Location.parse(path)
        document = read_document(location)
        attributes = finished_attributes(location, document)
        cache = cache or CacheConfig()
        copies = None if location.is_local else BoundedFolder(cache)
        folder = location.local_path() if copies is None else copy_index(location, document, copies)
        try:
            pixels = read_pixels_shape(folder, attributes.version)
            index: dict[str, ArrayReader] = {}
            for name in index_names(attributes.version):
                if copies is not None and name in BY_BLOCKS:
                    index[name] = RemoteArray(location, folder, name, copies)
                else:
                    index[name] = IndexReader(folder, name)
            shards: Shards = LocalShards(folder, pixels)
            if copies is not None:
                shards = RemoteShards(location, folder.name, pixels, copies)
            store = cls(location, attributes, pixels, index, shards, verify_checksums=verify_checksums, cache=cache)
            check_counts(location, attributes, index, pixels.num_slots)
        except StoreError as error:
            advice = _REMAKE if copies is None else _FETCH.format(location=location, folder=folder)
            raise StoreError(f"{error} {advice}") from error
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.location), self.verify_checksums, self._cache)

    def __len__(self) -> int:
        return self.num_samples

    @property
    def name(self) -> str:
        """Where the store is, as it was opened."""
        return str(self.location)

    @property
    def plan_hash(self) -> str:
        """sha256 of everything that decided the store's bytes."""
        return self.attributes.plan_hash

    @property
    def tokenizer_sha256(self) -> str:
        """Fingerprint of the tokenizer whose ids the samples hold."""
        return str(self.attributes.tokenizer["sha256"])

    def array(self, name: str) -> np.ndarray:
        """A whole index array, read-only; see `schema.INDEX_ARRAYS`. If it has several chunks, each call copies it."""
        return self._index[name][:]

    def rows(self, name: str) -> ArrayReader:
        """An index array of which some rows can be read without touching the others."""
        return self._index[name]

    def batch(self, seed: int, step: int, batch_size: int) -> Indices:
        """The samples of one step of a run that reads only this store.

        Args:
            seed: The run's seed.
            step: 0-based.
            batch_size: Samples of a step over all replicas.

        Returns:
            int64 (batch_size,), numbers of samples.
        """
        return global_batch(seed, step, batch_size, len(self))

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self._index["samples/tokens_offsets"]) - 1

    @property
    def num_images(self) -> int:
        """Number of images, including quarantined ones."""
        return len(self._index["images/start"])

    @property
    def version(self) -> int:
        """Format version: VERSION if all views have one size, MIXED_VERSION if they may have any."""
        return self.attributes.version

    @cached_property
    def layout(self) -> ViewLayout:
        """Which views of an image it holds; stores without that fact hold crops."""
        return ViewLayout(self.attributes.processor.get("layout", ViewLayout.CROPS))

    @property
    def crop_size(self) -> int:
        """Side of a view in pixels, of a store whose views have one size."""
        assert isinstance(self.pixels, PixelsShape), f"{self.location}: its views have many sizes"
        return self.pixels.crop_size

    def sample(self, index: int) -> Sample:
        """The sample `index`. Raises IndexError outside 0..num_samples-1."""
        self._check_number("sample", index, self.num_samples)
        first, last = self._index["samples/tokens_offsets"][index : index + 2]
        return Sample(
            id=self._text("samples/id", index),
            tokens=self._index["samples/tokens"][int(first) : int(last)],
            loss_mask=self._index["samples/loss_mask"][int(first) : int(last)],
            images=self.sample_images(index),
        )

    def prepare(self, samples: Indices) -> None:
        """Fetch what `sample` will read of these samples and is not on this node yet, with parallel requests.

        A local store does nothing here. Without this call, samples are fetched one after the other.

        Args:
            samples: int64 (N,) numbers of samples.
        """
        missing = []
        for name in ("samples/tokens", "samples/loss_mask", "samples/id"):
            array = self._index[name]
            if isinstance(array, RemoteArray):
                ends = self._index[_OFFSETS_OF.get(name, f"{name}_offsets")]
                first, stop = ends.take(samples), ends.take(samples + 1)
                some = stop > first
                missing += [(array, block) for block in array.missing(first[some], stop[some])]
        if missing:
            side_by_side(lambda one: one[0].fetch(one[1]), missing)

    def sample_images(self, index: int) -> tuple[int, ...]:
        """The images of sample `index`, without touching its tokens."""
        self._check_number("sample", index, self.num_samples)
        first, last = self._index["samples/images_offsets"][index : index + 2]
        return tuple(self._index["samples/images"][int(first) : int(last)].tolist())

    def lengths(self) -> np.ndarray:
        """int64 (num_samples,): the tokens of each sample; a placeholder counts as one."""
        return self._lengths

    @cached_property
    def _lengths(self) -> np.ndarray:
        lengths = np.diff(self._index["samples/tokens_offsets"][:])
        lengths.flags.writeable = False
        return lengths

    def grid(self, image: int) -> ImageShape:
        """The grid of an image's crops, its tiles, or the patches of its one view.

        Raises IndexError outside 0..num_images-1.
        """
        self._check_number("image", image, self.num_images)
        if self.version == MIXED_VERSION:
            return self.view_grid(image)
        width, height = self._index["images/size"][image].tolist() if self.layout is ViewLayout.TILES else (0, 0)
        return stored_shape(self.layout, self._index["images/grid"][image].tolist(), (width, height))

    def view_grid(self, image: int) -> ViewGrid:
        """The patches of an image's one view, which may have any size. Raises IndexError outside 0..num_images-1."""
        self._check_number("image", image, self.num_images)
        moving = int(self._index["images/frames"][image]) > 1
        frames, height, width = self._index["images/grid_thw"][image].tolist()
        return ViewGrid(frames, height, width, moving=moving)

    def view_shape(self, image: int) -> tuple[int, int, int, int]:
        """Frames, height and width in pixels, and 3, of the one view of an image, which may have any size."""
        grid, side = self.view_grid(image), int(self.attributes.processor["patch_size"])
        return int(self._index["images/frames"][image]), grid.height * side, grid.width * side, 3

    def image(self, index: int) -> StoredImage:
        """The image `index`. Raises IndexError outside 0..num_images-1."""
        self._check_number("image", index, self.num_images)
        width, height = self._index["images/size"][index].tolist()
        return StoredImage(
            start=int(self._index["images/start"][index]),
            count=int(self._index["images/count"][index]),
            grid=self.grid(index),
            size=(width, height),
            status=ImageStatus(int(self._index["images/status"][index])),
            path=self._text("images/path", index),
        )

    def read_views(self, image: int, views: Sequence[int]) -> np.ndarray:
        """Read views of one image.

        Args:
            image: The image's number.
            views: Numbers of its views, in any order; view 0 is the global view.

        Returns:
            uint8 (len(views), S, S, 3), in the order of `views`.

        Raises:
            StoreError: A shard is missing or short, a view was never written, or (with `verify_checksums`) its bytes
                have changed; the message names image, view and shard.
        """
        return self.read_many([(image, views)])

    def read_many(self, requests: Sequence[tuple[int, Sequence[int]]], out: np.ndarray | None = None) -> np.ndarray:
        """Read views of many images, in the order in which they lie in the shards, neighbours together.

        Args:
            requests: Pairs of an image and its views, as in `read_views`.
            out: uint8 (views of all requests, S, S, 3) that receives them; a new array if None.

        Returns:
            The views of all requests, one request after the other.

        Raises:
            StoreError: As in `read_views`, for the first fault found.
        """
        assert self.version == VERSION, f"{self.location}: its views have many sizes; read them with read_whole"
        slots, images = [], []
        for image, views in requests:
            start = self._start_of(image, views)
            slots += [start + view for view in views]
            images += [image] * len(views)
        if out is None:
            out = np.empty((len(slots), *self.pixels.slot_shape), dtype=np.uint8)
        assert out.shape == (len(slots), *self.pixels.slot_shape), (out.shape, len(slots))
        self._slots.read(slots, images, out)
        return out

    def read_whole(self, images: Sequence[int]) -> list[np.ndarray]:
        """Read the one view of each of some images, which may have any size, in the order of the shards.

        Args:
            images: Numbers of images.

        Returns:
            For each image uint8 (frames, height, width, 3), a part of one array that holds all of them.

        Raises:
            StoreError: As in `read_views`, for the first fault found.
        """
        assert self.version == MIXED_VERSION, f"{self.location}: its views have one size; read them with read_many"
        places = [0, *np.cumsum([num_blocks(prod(self.view_shape(image))) for image in images]).tolist()]
        blocks = np.empty((places[-1], *self.pixels.slot_shape), np.uint8)
        slots: list[int] = []
        owners: list[int] = []
        for image, first, last in zip(images, places[:-1], places[1:], strict=True):
            start = self._start_of(image, range(last - first))
            slots += range(start, start + last - first)
            owners += [image] * (last - first)
        self._slots.read(slots, owners, blocks)
        shapes = [self.view_shape(image) for image in images]
        pairs = zip(shapes, places, strict=False)
        return [from_blocks(blocks[first:], shape) for shape, first in pairs]

    def read_flat(self, images: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Read the one view of each of some images, which may have any size, one after another without gaps.

        Beside the result, at most 64 MiB are held, or the largest view.

        Args:
            images: Numbers of images.
            out: uint8 (bytes of all views,) that receives them; a new array if None.

        Returns:
            uint8 (bytes of all views,); each view is (frames, height, width, 3).

        Raises:
            StoreError: As in `read_views`, for the first fault found.
        """
        ends = np.cumsum([0, *(prod(self.view_shape(image)) for image in images)]).tolist()
        found = np.empty(ends[-1], np.uint8) if out is None else out
        assert found.shape == (ends[-1],), (found.shape, ends[-1])
        first = 0
        while first < len(images):
            last = max(bisect_right(ends, ends[first] + _MOST_FLAT_BYTES) - 1, first + 1)
            for number, view in enumerate(self.read_whole(images[first:last]), start=first):
                found[ends[number] : ends[number + 1]] = view.reshape(-1)
            first = last
        return found

    def _start_of(self, image: int, views: Sequence[int]) -> int:
        """The row of the image's global view. Raises StoreError if the image lacks one of the views."""
        self._check_number("image", image, self.num_images)
        count = int(self._index["images/count"][image])
        if any(not 0 <= view < count for view in views):
            what = "views" if self.version == VERSION else "blocks"
            raise StoreError(f"{self._names.image(image)} has {count} {what}; {what} {list(views)} were asked for")
        return int(self._index["images/start"][image])

    def _text(self, name: str, row: int) -> str:
        first, last = self._index[f"{name}_offsets"][row : row + 2]
        return self._index[name][int(first) : int(last)].tobytes().decode()

    def _check_number(self, noun: str, number: int, limit: int) -> None:
        if not 0 <= number < limit:
            raise IndexError(f"{self.location}: {noun} {number} was asked for; there are {limit}")


_OFFSETS_OF: Final = {"samples/loss_mask": "samples/tokens_offsets"}
"""The offsets to use for arrays that have none of their own."""


def _reopen(path: str, verify_checksums: bool, cache: CacheConfig) -> Store:
    return Store.open(path, verify_checksums=verify_checksums, cache=cache)
