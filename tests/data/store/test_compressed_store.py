"""Compressed stores: equal to zarr-python's answer and to the uncompressed store, deterministic, damage is named."""

import os
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import zarr

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.data.store.codec import CodecError, compress, decompress
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import shard_path
from megatron_deepstack.errors import StoreError
from megatron_deepstack.testing.tiny_store import GRIDS, write_tiny_store


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write_tiny_store(tmp_path / "packed", compression=Compression.ZSTD)


def shard_bytes(root: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((root / "images/pixels/c").rglob("0")) if path.is_file()]


def test_equal_to_zarr_python_and_to_the_uncompressed_store(packed: Path, tmp_path: Path) -> None:
    ours, plain = Store.open(packed), Store.open(write_tiny_store(tmp_path / "plain"))
    theirs = zarr.open_array(packed / "images/pixels", mode="r")
    assert ours.pixels.compression is Compression.ZSTD
    for number in range(ours.num_images):
        image = ours.image(number)
        views = ours.read_views(number, range(image.count))
        np.testing.assert_array_equal(views, theirs[image.start : image.start + image.count])
        np.testing.assert_array_equal(views, plain.read_views(number, range(image.count)))
    for array in ("images/crc32c", "images/start"):
        np.testing.assert_array_equal(ours.array(array), plain.array(array))


def test_zarr_python_writes_the_same_chunks(packed: Path, tmp_path: Path) -> None:
    theirs = zarr.open_array(packed / "images/pixels", mode="r")
    copy = zarr.create_array(
        tmp_path / "copy", shape=theirs.shape, chunks=theirs.chunks, dtype="u1", compressors=theirs.compressors
    )
    view = Store.open(packed).read_views(0, [0])
    copy[:1] = view
    assert (tmp_path / "copy/c/0/0/0/0").read_bytes() == compress(view[0])


def _write(folder: str) -> list[bytes]:
    return shard_bytes(write_tiny_store(Path(folder), compression=Compression.ZSTD))


def test_bytes_are_the_same_in_threads_and_processes(packed: Path, tmp_path: Path) -> None:
    expected = shard_bytes(packed)
    with ThreadPoolExecutor(3) as pool:
        written = list(pool.map(_write, [str(tmp_path / f"thread{n}") for n in range(3)]))
    with get_context("spawn").Pool(1) as processes:
        written += processes.map(_write, [str(tmp_path / "process")])
    assert all(shards == expected for shards in written)


def test_photos_take_less_space_and_noise_not_much_more() -> None:
    smooth = np.repeat(np.arange(0, 96, dtype=np.uint8), 96 * 3).reshape(96, 96, 3)
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    assert len(compress(smooth)) < smooth.nbytes / 4
    assert len(compress(noise)) < noise.nbytes + 64


@pytest.mark.parametrize("where", ["header", "blocks", "middle", "end"])
def test_damage_names_the_image(packed: Path, where: str) -> None:
    store = Store.open(packed)
    chunk = len(compress(store.read_views(0, [0])[0]))
    shard = packed / shard_path(0)
    data = bytearray(shard.read_bytes())
    place = {"header": 5, "blocks": 17, "middle": chunk // 2, "end": chunk - 1}[where]
    data[place] ^= 0x55
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"image 0 \('tiny/0.jpg'\)"):
        Store.open(packed).read_views(0, [0])
    Store.open(packed).read_views(0, [1])


def test_damage_that_does_not_unpack_is_named_without_checksums_too(packed: Path) -> None:
    shard = packed / shard_path(0)
    data = bytearray(shard.read_bytes())
    data[4:8] = (7).to_bytes(4, "little")
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"row 0 is damaged: its header promises .* unpack to 7, not .*image 0"):
        Store.open(packed, verify_checksums=False).read_views(0, [0])


@pytest.mark.parametrize("data", [b"", b"123", bytes(16), bytes(40)])
def test_what_is_no_chunk_is_a_codec_error(data: bytes) -> None:
    with pytest.raises(CodecError, match="promises"):
        decompress(memoryview(data), np.empty((4, 4, 3), np.uint8))


@pytest.mark.parametrize("compression", Compression)
def test_many_views_in_one_call(tmp_path: Path, compression: Compression) -> None:
    store = Store.open(write_tiny_store(tmp_path / "store", compression=compression))
    generator = np.random.default_rng(1)
    stored = [number for number, grid in enumerate(GRIDS) if grid]
    requests = []
    for number in generator.choice(stored, 40).tolist():
        count = store.image(number).count
        requests.append((number, generator.integers(0, count, int(generator.integers(0, 6))).tolist()))
    expected = np.concatenate([store.read_views(number, views) for number, views in requests])
    np.testing.assert_array_equal(store.read_many(requests), expected)
    out = np.zeros_like(expected)
    assert store.read_many(requests, out) is out
    np.testing.assert_array_equal(out, expected)
    assert store.read_many([]).shape == (0, 16, 16, 3)


def test_neighbours_share_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(write_tiny_store(tmp_path / "store"))
    store.read_views(0, [0])
    store.read_views(4, [0])
    calls = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: calls.append(args) or preadv(*args))
    store.read_many([(6, range(5)), (1, range(3)), (4, range(3)), (0, range(5)), (5, range(5))])
    assert len(calls) == 2, "one call for each shard: images 0 and 1, and 4, 5 and 6"
