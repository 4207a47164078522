"""The layout of a store: names, shapes, dtypes and zarr v3 metadata, shared by the writer and the reader.

A store is a zarr v3 group. `images/pixels` holds every view of every image once, with one view per chunk and one
preprocessing part per shard; rows of an image follow each other, its global view first. The other arrays are small flat
*index arrays*: where an image's rows start, and the samples as tokens, loss mask and references to images. Ragged data
is a flat array plus an array of offsets, because zarr v3 has no ragged arrays. The metadata documents are made here, as
plain values, so that the bytes of a store depend on no library version; any zarr v3 reader opens them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.data.store.codec import BLOSC_METADATA

FORMAT: Final = "megatron-deepstack-store"
VERSION: Final = 1
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


IMAGE_ARRAYS: Final = (
    IndexArray("images/start", "<i8"),
    IndexArray("images/count", "<u2"),
    IndexArray("images/grid", "<u2", (2,)),
    IndexArray("images/size", "<u4", (2,)),
    IndexArray("images/status", "|u1"),
    IndexArray("images/sha256", "|u1", (32,)),
    IndexArray("images/path", "|u1"),
    IndexArray("images/path_offsets", "<i8"),
    IndexArray("images/crc32c", "<u4"),
)
"""One row per image (`path_offsets` one more); but `path` holds UTF-8 bytes, and `crc32c` a row per row of pixels."""

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

INDEX_ARRAYS: Final = {array.name: array for array in (*IMAGE_ARRAYS, *SAMPLE_ARRAYS)}

_ZARR_DTYPES: Final = {"<i8": "int64", "<i4": "int32", "<u4": "uint32", "<u2": "uint16", "|u1": "uint8"}
_LITTLE_ENDIAN: Final = {"name": "bytes", "configuration": {"endian": "little"}}
_ONE_BYTE: Final = {"name": "bytes"}


@dataclass(frozen=True, slots=True)
class PixelsShape:
    """Shape of `images/pixels`: `num_parts` shards of `slots_per_part` views of `crop_size` x `crop_size` RGB."""

    num_parts: int
    slots_per_part: int
    crop_size: int
    compression: Compression = Compression.NONE

    @property
    def view_shape(self) -> tuple[int, int, int]:
        """(S, S, 3), uint8."""
        return (self.crop_size, self.crop_size, 3)

    @property
    def view_bytes(self) -> int:
        """Bytes of one view."""
        return self.crop_size * self.crop_size * 3

    @property
    def num_slots(self) -> int:
        """Rows of the array; a part uses the first ones of its shard and leaves the rest empty."""
        return self.num_parts * self.slots_per_part


def shard_index_bytes(shape: PixelsShape) -> int:
    """The size in bytes of a shard's index, at the end of the file: offset and length of each slot, and a crc32c."""
    return shape.slots_per_part * 16 + 4


def shard_path(part: int) -> str:
    """The path of a part's shard, relative to the store."""
    return f"{PIXELS}/c/{part}/0/0/0"


def index_chunk_path(array: IndexArray, chunk: int) -> str:
    """The path of one chunk file of an index array, relative to the store."""
    return "/".join([array.name, "c", str(chunk), *("0" for _ in array.row_shape)])


def group_metadata(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """zarr v3 metadata of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def pixels_metadata(shape: PixelsShape) -> dict[str, Any]:
    """The zarr v3 metadata of `images/pixels`: sharded, with the shard index and its checksum at the end."""
    sharding = {
        "chunk_shape": [1, *shape.view_shape],
        "codecs": [_ONE_BYTE] if shape.compression is Compression.NONE else [_ONE_BYTE, BLOSC_METADATA],
        "index_codecs": [_LITTLE_ENDIAN, {"name": "crc32c"}],
        "index_location": "end",
    }
    return _array_metadata(
        shape=(shape.num_slots, *shape.view_shape),
        chunk_shape=(shape.slots_per_part, *shape.view_shape),
        data_type="uint8",
        codecs=[{"name": "sharding_indexed", "configuration": sharding}],
        dimensions=("slot", "y", "x", "channel"),
    )


def index_metadata(array: IndexArray, rows: int) -> dict[str, Any]:
    """The zarr v3 metadata of an index array with `rows` rows: uncompressed, in chunks of `INDEX_ROWS_PER_CHUNK`."""
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
