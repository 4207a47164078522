"""Reading a store: samples from memory-mapped index arrays, views straight out of the shards.

A view is read with one `preadv` into the caller's array: the shard's index is cached, neighbouring views share a call,
and each view's crc32c is checked (0.06 ms). zarr-python reads the same store, equal by test, but ten times slower, and
takes a chunk that is missing for zeros; here that is a StoreError naming image and shard. The reader holds no threads
and no descriptors that a fork or a pickle could break: a copy in another process opens its own.
"""

from __future__ import annotations

import json
import operator
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final

import google_crc32c
import numpy as np

from megatron_deepstack.data.schema import (
    EMPTY_CHUNK,
    FORMAT,
    INDEX_ARRAYS,
    METADATA_FILE,
    PIXELS,
    VERSION,
    ImageStatus,
    PixelsShape,
    index_chunk_path,
    index_chunk_rows,
    index_metadata,
    pixels_metadata,
    shard_path,
)
from megatron_deepstack.errors import StoreError
from megatron_deepstack.planning.views import Grid

_OPEN_SHARDS: Final = 128
"""Shards kept open, with their indices: 5 KB each for DeepStack-L, 26 KB for DeepStack-HD."""
_RESTORE: Final = "Restore the shard from a copy, or preprocess into a new folder."


@dataclass(frozen=True, slots=True)
class StoreAttributes:
    """What a store says of itself."""

    format: str
    version: int
    plan_hash: str
    """sha256 of everything that decided the store's bytes: settings, records, tokenizer, list of images."""
    processor: dict[str, Any]
    """How views were made: crop_size, layout, num_crops, grid, resize, max_image_pixels."""
    tokenizer: dict[str, Any]
    """sha256, vocab_size, bos_id, eos_id, pad_id, and the conversation template."""
    counts: dict[str, int]
    """images, flagged, quarantined, views, samples, dropped, tokens, target_tokens."""
    complete: bool
    """Preprocessing came to its end."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation, tokenised; arrays are read-only views of the mapped file."""

    id: str
    tokens: np.ndarray
    """int32 (T,), one IMAGE_TOKEN_ID per image, in the order of `images`."""
    loss_mask: np.ndarray
    """uint8 (T,), 1 where the token itself is learned."""
    images: tuple[int, ...]
    """Image numbers; the same image may serve many samples."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """Where an image's views are, and what it was."""

    start: int
    """Row of `images/pixels` that holds the global view."""
    count: int
    """Number of views; 0 for a quarantined image."""
    grid: Grid
    size: tuple[int, int]
    """Width and height of the original in pixels."""
    status: ImageStatus
    path: str
    """Path as the records give it."""


class Store:
    """A finished store, opened for reading. Safe in threads and worker processes; pickles as its path."""

    def __init__(
        self,
        root: Path,
        attributes: StoreAttributes,
        pixels: PixelsShape,
        index: dict[str, IndexReader],
        *,
        verify_checksums: bool,
    ) -> None:
        self.root = root
        self.attributes = attributes
        self.pixels = pixels
        self.verify_checksums = verify_checksums
        self._index = index
        self._shards = ShardCache(root, pixels)

    @classmethod
    def open(cls, path: str | Path, *, verify_checksums: bool = True) -> Store:
        """Open the store in folder `path`.

        Raises StoreError where there is no store, where preprocessing has not finished, where the format is another
        version's, or where an index array is damaged. Pixels are looked at when they are read.
        """
        root = Path(path)
        attributes = read_attributes(root)
        if not attributes.complete:
            raise StoreError(
                f"{root}: preprocessing of this store has not finished. Run the same `preprocess` command again: "
                "it goes on where it stopped."
            )
        pixels = _read_pixels_shape(root)
        index = {name: IndexReader(root, name) for name in INDEX_ARRAYS}
        store = cls(root, attributes, pixels, index, verify_checksums=verify_checksums)
        store._check_counts()
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.root), self.verify_checksums)

    def __len__(self) -> int:
        return self.num_samples

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self._index["samples/tokens_offsets"]) - 1

    @property
    def num_images(self) -> int:
        """Number of images, quarantined ones included."""
        return len(self._index["images/start"])

    @property
    def crop_size(self) -> int:
        """Side of a view in pixels."""
        return self.pixels.crop_size

    def sample(self, index: int) -> Sample:
        """Sample `index`; raises IndexError outside 0..num_samples-1."""
        self._check_number("sample", index, self.num_samples)
        first, last = self._index["samples/tokens_offsets"][index : index + 2]
        return Sample(
            id=self._text("samples/id", index),
            tokens=self._index["samples/tokens"][int(first) : int(last)],
            loss_mask=self._index["samples/loss_mask"][int(first) : int(last)],
            images=self.sample_images(index),
        )

    def sample_images(self, index: int) -> tuple[int, ...]:
        """Images of sample `index`, without touching its tokens."""
        self._check_number("sample", index, self.num_samples)
        first, last = self._index["samples/images_offsets"][index : index + 2]
        return tuple(self._index["samples/images"][int(first) : int(last)].tolist())

    def lengths(self) -> np.ndarray:
        """int64 (num_samples,): tokens of each sample, a placeholder counting as one."""
        return self._lengths

    @cached_property
    def _lengths(self) -> np.ndarray:
        lengths = np.diff(self._index["samples/tokens_offsets"][:])
        lengths.flags.writeable = False
        return lengths

    def image(self, index: int) -> StoredImage:
        """Image `index`; raises IndexError outside 0..num_images-1."""
        self._check_number("image", index, self.num_images)
        gw, gh = self._index["images/grid"][index].tolist()
        width, height = self._index["images/size"][index].tolist()
        return StoredImage(
            start=int(self._index["images/start"][index]),
            count=int(self._index["images/count"][index]),
            grid=(gw, gh),
            size=(width, height),
            status=ImageStatus(int(self._index["images/status"][index])),
            path=self._text("images/path", index),
        )

    def read_views(self, image: int, views: Sequence[int]) -> np.ndarray:
        """Views of an image: uint8 (len(views), S, S, 3), in the order asked for; view 0 is the global view.

        Raises StoreError, naming image, view and shard, when a shard is missing or short, a view was never written,
        or (with `verify_checksums`) a view's bytes are not those that were written.
        """
        self._check_number("image", image, self.num_images)
        start, count = int(self._index["images/start"][image]), int(self._index["images/count"][image])
        if any(not 0 <= view < count for view in views):
            raise StoreError(f"{self._where(image)} has {count} views; views {list(views)} were asked for")
        out = np.empty((len(views), *self.pixels.view_shape), dtype=np.uint8)
        try:
            self._shards.read([start + view for view in views], out)
        except ShardError as error:
            raise StoreError(f"{error} It holds {self._where(image)}. {_RESTORE}") from error
        if self.verify_checksums:
            self._check_views(image, start, views, out)
        return out

    def _check_views(self, image: int, start: int, views: Sequence[int], out: np.ndarray) -> None:
        for view, pixels in zip(views, out, strict=True):
            found = google_crc32c.value(pixels)
            stored = int(self._index["images/crc32c"][start + view])
            if found != stored:
                shard = self.root / shard_path((start + view) // self.pixels.slots_per_part)
                raise StoreError(
                    f"{shard}: view {view} of {self._where(image)} is damaged: its crc32c is {found:08x}, "
                    f"{stored:08x} was written. {_RESTORE}"
                )

    def _where(self, image: int) -> str:
        return f"image {image} ({self._text('images/path', image)!r}) of store {self.root}"

    def _text(self, name: str, row: int) -> str:
        first, last = self._index[f"{name}_offsets"][row : row + 2]
        return self._index[name][int(first) : int(last)].tobytes().decode()

    def _check_number(self, noun: str, number: int, limit: int) -> None:
        if not 0 <= number < limit:
            raise IndexError(f"{self.root}: {noun} {number} was asked for; there are {limit}")

    def _check_counts(self) -> None:
        """Lengths of arrays that must agree do; a damaged index is found at once and not at sample 400,000."""
        images, samples, counts = self.num_images, self.num_samples, self.attributes.counts
        self._check_rows(
            {
                "images/start": counts.get("images", -1),
                **dict.fromkeys((f"images/{name}" for name in ("count", "grid", "size", "status", "sha256")), images),
                "images/path_offsets": images + 1,
                "images/crc32c": self.pixels.num_slots,
                "samples/tokens_offsets": counts.get("samples", -2) + 1,
                "samples/images_offsets": samples + 1,
                "samples/id_offsets": samples + 1,
                "samples/loss_mask": len(self._index["samples/tokens"]),
            }
        )
        ends = {name: self._index[f"{name}_offsets"] for name in _RAGGED}
        self._check_rows({name: int(offsets[len(offsets) - 1]) for name, offsets in ends.items()})

    def _check_rows(self, expected: Mapping[str, int]) -> None:
        found = {name: len(self._index[name]) for name in expected}
        wrong = [
            f"{name} has {found[name]} rows, {rows} expected" for name, rows in expected.items() if found[name] != rows
        ]
        if wrong:
            raise StoreError(f"{self.root}: the store contradicts itself: {'; '.join(wrong)}. Preprocess it again.")


_RAGGED: Final = ("samples/tokens", "samples/images", "samples/id", "images/path")
"""Flat arrays whose rows an array of offsets delimits."""


class IndexReader:
    """One index array, memory-mapped chunk by chunk; a slice within one chunk copies nothing."""

    def __init__(self, root: Path, name: str) -> None:
        array = INDEX_ARRAYS[name]
        metadata = read_metadata(root, name)
        shape = metadata.get("shape")
        if not isinstance(shape, list) or not shape or not isinstance(shape[0], int) or shape[0] < 0:
            raise StoreError(f"{root / name / METADATA_FILE}: its shape is {shape!r}. The store is damaged.")
        self._rows = shape[0]
        _check_metadata(root / name, metadata, index_metadata(array, self._rows))
        self._chunk_rows = index_chunk_rows(self._rows)
        chunk_shape = (self._chunk_rows, *array.row_shape)
        num_chunks = -(-self._rows // self._chunk_rows)
        self._chunks = [
            _map_chunk(root / index_chunk_path(array, k), array.dtype, chunk_shape) for k in range(num_chunks)
        ]
        self._empty = np.empty((0, *array.row_shape), dtype=array.dtype)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        if not isinstance(rows, slice):
            chunk, row = divmod(operator.index(rows), self._chunk_rows)
            return self._chunks[chunk][row]
        first, last, _ = rows.indices(self._rows)
        pieces = list(self._pieces(first, last))
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else self._empty

    def _pieces(self, first: int, last: int) -> Iterator[np.ndarray]:
        while first < last:
            chunk, row = divmod(first, self._chunk_rows)
            piece = self._chunks[chunk][row : row + last - first]
            yield piece
            first += len(piece)


class ShardError(Exception):
    """A shard is missing, short or without the view asked for; the message ends in a full stop."""


class ShardCache:
    """Open shards and their indices, the most recently used ones."""

    def __init__(self, root: Path, pixels: PixelsShape) -> None:
        self._root = root
        self._pixels = pixels
        self._lock = threading.Lock()
        self._open: OrderedDict[int, tuple[BinaryIO, np.ndarray]] = OrderedDict()

    def read(self, slots: Sequence[int], out: np.ndarray) -> None:
        """Read the views in `slots`, rows of `images/pixels`, into `out`; neighbours in one call."""
        offsets: list[int] = []
        for part, slot in (divmod(slot, self._pixels.slots_per_part) for slot in slots):
            offset, size = self._shard(part)[1][slot].tolist()
            if offset == EMPTY_CHUNK or size != self._pixels.view_bytes:
                raise ShardError(f"{self._root / shard_path(part)}: slot {slot} was never written.")
            offsets.append(offset)
        first = 0
        for last in range(1, len(slots) + 1):
            part = slots[first] // self._pixels.slots_per_part
            together = last < len(slots) and slots[last] // self._pixels.slots_per_part == part
            if not together or offsets[last] != offsets[last - 1] + self._pixels.view_bytes:
                self._read_bytes(part, offsets[first], out[first:last])
                first = last

    def _read_bytes(self, part: int, offset: int, out: np.ndarray) -> None:
        """Fill `out` from `offset` of a shard; the system may hand over fewer bytes than asked for."""
        file = self._shard(part)[0]
        rest = out.reshape(-1).data
        while rest:
            count = os.preadv(file.fileno(), [rest], offset)
            if count == 0:
                raise ShardError(f"{self._root / shard_path(part)}: the shard ends before byte {offset + len(rest)}.")
            rest, offset = rest[count:], offset + count

    def _shard(self, part: int) -> tuple[BinaryIO, np.ndarray]:
        """Open file and index (uint64 (slots, 2): offset and length) of a shard.

        An evicted file is closed by its last user's reference going away, so no thread reads through a recycled
        descriptor.
        """
        with self._lock:
            shard = self._open.get(part)
            if shard is None:
                shard = self._open[part] = self._open_shard(part)
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(part)
            return shard

    def _open_shard(self, part: int) -> tuple[BinaryIO, np.ndarray]:
        path = self._root / shard_path(part)
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - stays open in the cache
        except OSError as error:
            raise ShardError(f"{path}: the shard cannot be opened: {error.strerror or error}.") from error
        index_bytes = self._pixels.slots_per_part * 16
        position = os.fstat(file.fileno()).st_size - index_bytes - 4
        raw = os.pread(file.fileno(), index_bytes + 4, position) if position >= 0 else b""
        if len(raw) != index_bytes + 4 or google_crc32c.value(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
            file.close()
            raise ShardError(f"{path}: the shard's index is damaged or cut off.")
        return file, np.frombuffer(raw[:-4], dtype="<u8").reshape(-1, 2)


def read_attributes(root: Path) -> StoreAttributes:
    """Attributes of the store in `root`, finished or not; raises StoreError where there is none we can read."""
    if not root.is_dir():
        raise StoreError(f"{root}: no such folder. A store is made by `megatron-deepstack preprocess`.")
    if not (root / METADATA_FILE).is_file():
        raise StoreError(f"{root}: not a store: it has no {METADATA_FILE}. Stores are made by `preprocess`.")
    raw = read_metadata(root, "").get("attributes", {})
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else raw
        raise StoreError(f"{root}: a zarr group, but not one of ours: its `format` is {found!r}, expected {FORMAT!r}.")
    if raw.get("version") != VERSION:
        raise StoreError(
            f"{root}: the store has format version {raw.get('version')!r}, this program reads {VERSION}. "
            "Preprocess the data again with this version."
        )
    names = StoreAttributes.__dataclass_fields__
    missing = [name for name in names if name not in raw]
    if missing:
        raise StoreError(f"{root / METADATA_FILE}: attributes {missing} are missing. Preprocess the data again.")
    return StoreAttributes(**{name: raw[name] for name in names})


def read_metadata(root: Path, name: str) -> dict[str, Any]:
    """zarr metadata of an array or group below `root`."""
    path = root / name / METADATA_FILE
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}. The store is damaged.") from error
    except ValueError as error:
        raise StoreError(f"{path}: not JSON: {error}. The store is damaged.") from error
    if not isinstance(document, dict):
        raise StoreError(f"{path}: holds a {type(document).__name__}, a JSON object was expected.")
    return document


def _read_pixels_shape(root: Path) -> PixelsShape:
    metadata = read_metadata(root, PIXELS)
    try:
        slots, crop_size = metadata["shape"][0], metadata["shape"][1]
        slots_per_part = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        shape = PixelsShape(num_parts=slots // slots_per_part, slots_per_part=slots_per_part, crop_size=crop_size)
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise StoreError(f"{root / PIXELS}: metadata lacks shape or shards. The store is damaged.") from error
    _check_metadata(root / PIXELS, metadata, pixels_metadata(shape))
    return shape


def _check_metadata(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    keys = ("shape", "data_type", "chunk_grid", "codecs", "fill_value")
    differing = [key for key in keys if found.get(key) != expected[key]]
    wrong = [f"{key} is {found.get(key)!r}, expected {expected[key]!r}" for key in differing]
    if wrong:
        raise StoreError(f"{path / METADATA_FILE}: {'; '.join(wrong)}. The store was changed or is damaged.")


def _map_chunk(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    expected = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    try:
        found = path.stat().st_size
        if found != expected:
            raise StoreError(f"{path}: has {found} bytes, expected {expected}. The store is damaged: preprocess again.")
        return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=shape))
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}. The store is damaged.") from error


def _reopen(path: str, verify_checksums: bool) -> Store:
    return Store.open(path, verify_checksums=verify_checksums)
