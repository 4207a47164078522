"""The layout of a store: names, shapes, dtypes and zarr v3 metadata, shared by the writer and the reader.

A store is a zarr v3 group. `images/pixels` holds every view of every image once, and one preprocessing part is one
shard of it. A shard consists of *slots*, which are the chunks of the array; slots of an image follow each other. The
other arrays are small flat *index arrays*: where an image's slots start, and the samples as tokens, loss mask and
references to images. Ragged data is a flat array plus an array of offsets, because zarr v3 has no ragged arrays. The
metadata documents are made here, as plain values, so that the bytes of a store depend on no library version; any zarr
v3 reader opens them.

There are two kinds of store, by what a slot is:

- Views of one size (`PixelsShape`, format version 1). A slot is one view, (S, S, 3); the global view is the first.
- Views of any size (`BlockSlots`, format version 2). A slot is a block of 64 KiB. A view (frames, height, width, 3)
  fills a whole number of blocks, and the rest of its last block is zero. So a view is one contiguous read, blocks are
  checked, compressed, cached and copied to other stores like views of one size, and zarr-python reads a view as
  `pixels[start : start + count].reshape(-1)[:size].reshape(shape)`.

Chunks of different sizes (rectilinear grids) would waste nothing, but the releases of zarr-python that are supported
have none, and an array for each size of view would mean thousands of arrays. Larger blocks waste more, smaller ones are
slow in zarr-python. On views from 200x150 to 4000x3000, blocks of 16, 64 and 256 KiB filled up 0.1, 0.6 and 1.5 % more
space (and 0.9, 3.6 and 14 % at 640x480), and zarr-python took 78, 28 and 8 ms a view; our reader takes 0.9 ms from 64
KiB on, and 2.6 ms with 16 KiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.data.store.codec import BLOSC_METADATA

FORMAT: Final = "megatron-deepstack-store"
VERSION: Final = 1
"""Version of stores whose views have one size."""
MIXED_VERSION: Final = 2
"""Version of stores whose views may have any size."""
METADATA_FILE: Final = "zarr.json"

PIXELS: Final = "images/pixels"
EMPTY_CHUNK: Final = 2**64 - 1
"""Offset and length in a shard's index of a chunk that was never written (zarr v3, sharding codec)."""
INDEX_ROWS_PER_CHUNK: Final = 1 << 24
"""Rows of an index array in one chunk file; a shorter array has one chunk, which is as long as the array."""


class ImageStatus(IntEnum):
    """The result of preprocessing an image."""

    STORED = 0
    FLAGGED = 1
    """Stored, but the file is damaged, or its conversion to RGB lost something; see `quarantine.jsonl`."""
    QUARANTINED = 2
    """Not stored: it has no views and no sample refers to it."""


@dataclass(frozen=True, slots=True)
class IndexArray:
    """One index array: `rows` x `row_shape` values of `dtype`."""

    name: str
    dtype: str
    """numpy's name of a little-endian or one-byte dtype."""
    row_shape: tuple[int, ...] = ()


_IMAGE_START: Final = (IndexArray("images/start", "<i8"), IndexArray("images/count", "<u2"))
_IMAGE_FACTS: Final = (
    IndexArray("images/size", "<u4", (2,)),
    IndexArray("images/status", "|u1"),
    IndexArray("images/sha256", "|u1", (32,)),
    IndexArray("images/path", "|u1"),
    IndexArray("images/path_offsets", "<i8"),
    IndexArray("images/crc32c", "<u4"),
)
IMAGE_ARRAYS: Final = (*_IMAGE_START, IndexArray("images/grid", "<u2", (2,)), *_IMAGE_FACTS)
"""One row per image (`path_offsets` one more); but `path` holds UTF-8 bytes, and `crc32c` a row per slot."""
MIXED_IMAGE_ARRAYS: Final = (
    *_IMAGE_START,
    IndexArray("images/grid_thw", "<u2", (3,)),
    IndexArray("images/frames", "|u1"),
    *_IMAGE_FACTS,
)
"""The same for views of any size: in place of the grid of crops, the view's patches in time, height and width (named as
in the published code), and the number of its frames, which is 1 for a picture and 2 for a pair of frames of a video."""

SAMPLE_ARRAYS: Final = (
    IndexArray("samples/tokens", "<i4"),
    IndexArray("samples/loss_mask", "|u1"),
    IndexArray("samples/tokens_offsets", "<i8"),
    IndexArray("samples/images", "<i8"),
    IndexArray("samples/images_offsets", "<i8"),
    IndexArray("samples/id", "|u1"),
    IndexArray("samples/id_offsets", "<i8"),
)
"""Flat values and their offsets; each array of offsets begins with 0 and has one row more than there are samples."""

INDEX_ARRAYS: Final = {array.name: array for array in (*IMAGE_ARRAYS, *MIXED_IMAGE_ARRAYS, *SAMPLE_ARRAYS)}
"""The index arrays of both kinds of store, by name; `index_names` says which of them a store has."""


def index_names(version: int) -> tuple[str, ...]:
    """Return the names of the index arrays of a store with that format version."""
    images = MIXED_IMAGE_ARRAYS if version == MIXED_VERSION else IMAGE_ARRAYS
    return tuple(array.name for array in (*images, *SAMPLE_ARRAYS))


_ZARR_DTYPES: Final = {"<i8": "int64", "<i4": "int32", "<u4": "uint32", "<u2": "uint16", "|u1": "uint8"}
_LITTLE_ENDIAN: Final = {"name": "bytes", "configuration": {"endian": "little"}}
_ONE_BYTE: Final = {"name": "bytes"}


BLOCK_BYTES: Final = 64 << 10
"""Size of a block; see the top of this file for why it has this size."""


@dataclass(frozen=True, slots=True)
class PixelsShape:
    """Shape of `images/pixels` for views of one size: each slot is a view of `crop_size` x `crop_size` RGB."""

    num_parts: int
    slots_per_part: int
    crop_size: int
    compression: Compression = Compression.NONE

    @property
    def version(self) -> int:
        """Format version of the store."""
        return VERSION

    @property
    def slot_shape(self) -> tuple[int, int, int]:
        """(S, S, 3), uint8."""
        return (self.crop_size, self.crop_size, 3)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot before compression."""
        return self.crop_size * self.crop_size * 3

    @property
    def num_slots(self) -> int:
        """Rows of the array; a part uses the first ones of its shard and leaves the rest empty."""
        return self.num_parts * self.slots_per_part

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the array's dimensions."""
        return ("slot", "y", "x", "channel")

    def shard_path(self, part: int) -> str:
        """The path of a part's shard, relative to the store."""
        return shard_path(part, len(self.dimensions))


@dataclass(frozen=True, slots=True)
class BlockSlots:
    """Shape of `images/pixels` for views of any size: each slot is a block of `BLOCK_BYTES`, some blocks are a view."""

    num_parts: int
    slots_per_part: int
    compression: Compression = Compression.NONE

    @property
    def version(self) -> int:
        """Format version of the store."""
        return MIXED_VERSION

    @property
    def slot_shape(self) -> tuple[int]:
        """(BLOCK_BYTES,), uint8."""
        return (BLOCK_BYTES,)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot before compression."""
        return BLOCK_BYTES

    @property
    def num_slots(self) -> int:
        """Rows of the array; a part uses the first ones of its shard and leaves the rest empty."""
        return self.num_parts * self.slots_per_part

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the array's dimensions."""
        return ("slot", "byte")

    def shard_path(self, part: int) -> str:
        """The path of a part's shard, relative to the store."""
        return shard_path(part, len(self.dimensions))


SlotsShape = PixelsShape | BlockSlots
"""Shape of `images/pixels` of either kind of store."""


def num_blocks(num_bytes: int) -> int:
    """Return the number of blocks that a view of that many bytes takes."""
    return -(-num_bytes // BLOCK_BYTES)


def shard_index_bytes(shape: SlotsShape) -> int:
    """The size in bytes of a shard's index, at the end of the file: offset and length of each slot, and a crc32c."""
    return shape.slots_per_part * 16 + 4


def shard_path(part: int, num_dims: int = 4) -> str:
    """The path of a part's shard, relative to the store.

    Args:
        part: The part's number.
        num_dims: Number of dimensions of `images/pixels`, 4 for views of one size; `SlotsShape.shard_path` knows it.

    Returns:
        The path.
    """
    return f"{PIXELS}/c/{part}" + "/0" * (num_dims - 1)


def index_chunk_path(array: IndexArray, chunk: int) -> str:
    """The path of one chunk file of an index array.

    Args:
        array: The array.
        chunk: The chunk's number, from 0.

    Returns:
        The path, relative to the store.
    """
    return "/".join([array.name, "c", str(chunk), *("0" for _ in array.row_shape)])


def group_metadata(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """zarr v3 metadata of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def pixels_metadata(shape: SlotsShape) -> dict[str, Any]:
    """The zarr v3 metadata of `images/pixels`: sharded, with the shard index and its checksum at the end."""
    sharding = {
        "chunk_shape": [1, *shape.slot_shape],
        "codecs": [_ONE_BYTE] if shape.compression is Compression.NONE else [_ONE_BYTE, BLOSC_METADATA],
        "index_codecs": [_LITTLE_ENDIAN, {"name": "crc32c"}],
        "index_location": "end",
    }
    return _array_metadata(
        shape=(shape.num_slots, *shape.slot_shape),
        chunk_shape=(shape.slots_per_part, *shape.slot_shape),
        data_type="uint8",
        codecs=[{"name": "sharding_indexed", "configuration": sharding}],
        dimensions=shape.dimensions,
    )


def index_metadata(array: IndexArray, rows: int) -> dict[str, Any]:
    """The zarr v3 metadata of an index array: uncompressed, in chunks of `INDEX_ROWS_PER_CHUNK` rows.

    Args:
        array: The array.
        rows: Its rows, which are known only when all are written.

    Returns:
        The document.
    """
    return _array_metadata(
        shape=(rows, *array.row_shape),
        chunk_shape=(index_chunk_rows(rows), *array.row_shape),
        data_type=_ZARR_DTYPES[array.dtype],
        codecs=[_ONE_BYTE if array.dtype == "|u1" else _LITTLE_ENDIAN],
        dimensions=None,
    )


def index_chunk_rows(rows: int) -> int:
    """The rows in each chunk of an index array that has `rows` rows altogether."""
    return max(1, min(rows, INDEX_ROWS_PER_CHUNK))


def _array_metadata(
    *,
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    data_type: str,
    codecs: list[dict[str, Any]],
    dimensions: tuple[str, ...] | None,
) -> dict[str, Any]:
    document: dict[str, Any] = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": codecs,
        "attributes": {},
        "storage_transformers": [],
    }
    if dimensions is not None:
        document["dimension_names"] = list(dimensions)
    return document
