"""A store of views of many sizes: one contiguous read a view, checked, readable by zarr-python, merged and split."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.data.store import reader, schema
from megatron_deepstack.data.store.blocks import as_blocks, from_blocks
from megatron_deepstack.data.store.index import IndexReader
from megatron_deepstack.data.store.lengths import expanded_lengths
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import BLOCK_BYTES, BlockSlots
from megatron_deepstack.data.store.shards import LocalShards
from megatron_deepstack.data.store.url.cache import CacheConfig
from megatron_deepstack.errors import StoreError
from megatron_deepstack.planning.views import ViewGrid
from megatron_deepstack.storekeeping.rewrite.merge import merge
from megatron_deepstack.storekeeping.rewrite.split import split
from megatron_deepstack.storekeeping.verify import verify
from megatron_deepstack.testing.tiny_mixed import SAMPLES, SHAPES, tiny_view, write_tiny_mixed

STORED = [number for number, shape in enumerate(SHAPES) if shape]


@pytest.fixture(scope="module", params=list(Compression))
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_mixed(tmp_path_factory.mktemp("mixed") / "store", compression=request.param)


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "store"))


def assert_whole(store: Store, images: list[int], seed: int = 0) -> None:
    for number, view in zip(images, store.read_whole(images), strict=True):
        shape = SHAPES[number]
        assert shape is not None
        np.testing.assert_array_equal(view, tiny_view(seed, number, shape))


def test_every_view_is_what_was_written(root: Path) -> None:
    store = Store.open(root)
    assert_whole(store, STORED)
    assert_whole(store, [*reversed(STORED), STORED[0]])
    assert store.read_whole([]) == []
    assert store.view_grid(2) == ViewGrid(frames=1, height=6, width=4, moving=True)
    assert store.view_shape(2) == (2, 96, 64, 3)
    assert pickle.loads(pickle.dumps(store)).read_whole([0])[0].shape == (1, 32, 64, 3)


@pytest.mark.parametrize("most", [1, 40_000, 1 << 30])
def test_views_one_after_another_in_pieces_of_any_size(root: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(reader, "_MOST_FLAT_BYTES", most)
    images = [5, 0, 2, 1, 5]
    expected = np.concatenate([tiny_view(0, image, SHAPES[image]).reshape(-1) for image in images])  # type: ignore[arg-type]
    np.testing.assert_array_equal(Store.open(root).read_flat(images), expected)
    assert Store.open(root).read_flat([]).shape == (0,)


def test_zarr_python_reads_every_view_as_one_slice(root: Path) -> None:
    store, theirs = Store.open(root), zarr.open_group(root, mode="r")
    pixels, index = theirs["images/pixels"], theirs["images"]
    assert pixels.shape == (60, BLOCK_BYTES)
    for number in STORED:
        start, count = (int(index[name][number]) for name in ("start", "count"))
        shape = store.view_shape(number)
        view = pixels[start : start + count].reshape(-1)[: np.prod(shape)].reshape(shape)
        np.testing.assert_array_equal(view, store.read_whole([number])[0])
    for name in schema.index_names(schema.MIXED_VERSION):
        np.testing.assert_array_equal(IndexReader(root, name)[:], theirs[name][:])


def test_a_view_is_one_contiguous_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(write_tiny_mixed(tmp_path / "store"))
    reads: list[int] = []
    fill = LocalShards._fill

    def spy(self: LocalShards, file: int, buffers: list[memoryview], offset: int, slot: int) -> None:
        reads.append(sum(map(len, buffers)))
        fill(self, file, buffers, offset, slot)

    monkeypatch.setattr(LocalShards, "_fill", spy)
    store.read_whole([5])
    assert reads == [4 * BLOCK_BYTES]
    store.read_whole([4, 5])
    assert reads[1:] == [5 * BLOCK_BYTES], "neighbours are read together"


def test_text_and_counts_of_rows_need_no_pixels(root: Path) -> None:
    store = Store.open(root)
    assert [store.sample_images(number) for number in range(len(store))] == list(SAMPLES)
    rows = [(shape[1] // 32) * (shape[2] // 32) if shape else 0 for shape in SHAPES]
    expected = store.lengths() + [sum(rows[image] - 1 for image in images) for images in SAMPLES]
    np.testing.assert_array_equal(expanded_lengths(store, ModelConfig()), expected)


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    one, two = (write_tiny_mixed(tmp_path / name) for name in ("one", "two"))
    files = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    assert all((one / path).read_bytes() == (two / path).read_bytes() for path in files)


def damage(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_a_changed_byte_is_named(tmp_path: Path) -> None:
    root = write_tiny_mixed(tmp_path / "store")
    damage(root / schema.shard_path(1, 2), BLOCK_BYTES + 5)
    store = Store.open(root)
    with pytest.raises(
        StoreError, match=r"c/1/0: block 0 of image 5 \('mixed/5.jpg'\) of store .* is damaged: its crc32c"
    ):
        store.read_whole([4, 5])
    assert_whole(store, [4, 6])
    assert not np.array_equal(
        Store.open(root, verify_checksums=False).read_whole([5])[0], tiny_view(0, 5, (1, 320, 256))
    )
    faults = [str(fault) for fault in verify(str(root), processes=1)]
    assert len(faults) == 1
    assert "block 0 of image 5 ('mixed/5.jpg') is damaged" in faults[0]


def test_an_image_in_quarantine_has_no_view(root: Path) -> None:
    with pytest.raises(AssertionError, match="its views have many sizes"):
        Store.open(root).read_many([(0, [0])])
    assert Store.open(root).read_whole([3])[0].size == 0


def change(name: str, row: int, value: object) -> Callable[[Path], None]:
    def fault(root: Path) -> None:
        array = schema.INDEX_ARRAYS[name]
        path = root / schema.index_chunk_path(array, 0)
        values = np.fromfile(path, array.dtype).reshape(-1, *array.row_shape)
        values[row] = value
        values.tofile(path)

    return fault


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            change("images/grid_thw", 0, (1, 3, 4)),
            "grid_thw: image 0: no grid of patches of which 2 x 2 become a token",
        ),
        (change("images/grid_thw", 5, (1, 2, 2)), "count: image 5: its view fills 1 blocks, found 4"),
        (change("images/frames", 2, 3), "frames: image 2: one frame, or a pair of them, was expected"),
        (change("images/count", 1, 1), "count: image 1: its view fills 2 blocks, found 1"),
        (change("images/status", 4, 9), "status: image 4: not one of"),
        (change("images/start", 4, 22), "does not follow the image before it"),
        (lambda root: (root / schema.shard_path(2, 2)).unlink(), "c/2/0: cannot be read: No such file"),
        (lambda root: (root / schema.shard_path(2, 2)).with_name("1").write_bytes(b""), "is no shard of this store"),
    ],
)
def test_verify_finds(tmp_path: Path, fault: Callable[[Path], object], message: str) -> None:
    root = write_tiny_mixed(tmp_path / "store")
    assert not verify(str(root), processes=1)
    fault(root)
    assert any(message in str(found) for found in verify(str(root), processes=1))


def test_an_older_program_would_refuse_it_and_this_one_refuses_a_newer_store(copied: Path) -> None:
    document = (copied / "zarr.json").read_text()
    assert '"version": 2' in document
    (copied / "zarr.json").write_text(document.replace('"version": 2', '"version": 3'))
    with pytest.raises(StoreError, match=r"format version 3, this program reads 1 and 2\. Preprocess"):
        Store.open(copied)


def test_merged_and_split_stores_hold_the_same_views(root: Path, tmp_path: Path) -> None:
    compression = Store.open(root).pixels.compression
    other = write_tiny_mixed(
        tmp_path / "other", compression=compression, seed=5, name="others", images_per_part=8, slots_per_part=30
    )
    merge(tmp_path / "both", [root, other])
    both = Store.open(tmp_path / "both")
    assert len(both) == 2 * len(SAMPLES)
    assert not verify(str(tmp_path / "both"), processes=1)
    for seed, first in ((0, 0), (5, len(SAMPLES))):
        for number, images in enumerate(SAMPLES):
            views = both.read_whole(list(both.sample_images(first + number)))
            for image, view in zip(images, views, strict=True):
                np.testing.assert_array_equal(view, tiny_view(seed, image, SHAPES[image]))  # type: ignore[arg-type]
    split(tmp_path / "both", tmp_path / "train", tmp_path / "heldout", count=4, seed=1)
    sizes = [len(Store.open(tmp_path / name)) for name in ("train", "heldout")]
    assert sizes == [2 * len(SAMPLES) - 4, 4]
    assert not [fault for name in ("train", "heldout") for fault in verify(str(tmp_path / name), processes=1)]
    assert both.attributes.counts["views"] == 2 * len(STORED)


def test_views_of_one_size_and_of_many_cannot_become_one_store(tmp_path: Path) -> None:
    from megatron_deepstack.testing.tiny_store import write_tiny_store

    paths = [write_tiny_mixed(tmp_path / "mixed"), write_tiny_store(tmp_path / "tiny")]
    with pytest.raises(StoreError, match=r"were made differently.*\n  version: 2 in .*mixed, 1 in "):
        merge(tmp_path / "both", paths)


def test_behind_a_url(root: Path, bucket: str, tmp_path: Path) -> None:
    import s3fs

    s3fs.S3FileSystem().put(str(root), f"{bucket}/x", recursive=True)
    cache = CacheConfig(str(tmp_path / "cache"), 1 << 30)
    store = Store.open(f"{bucket}/x", cache=cache)
    assert_whole(store, STORED)
    s3fs.S3FileSystem().rm(f"{bucket}/x/images/pixels/c", recursive=True)
    assert_whole(Store.open(f"{bucket}/x", cache=cache), STORED)


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES])
def test_views_to_blocks_and_back(size: int) -> None:
    view = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    dirty = np.full((5, BLOCK_BYTES), 7, np.uint8)
    for blocks in (as_blocks(view), as_blocks(view, dirty)):
        assert len(blocks) == schema.num_blocks(size)
        np.testing.assert_array_equal(from_blocks(blocks, (size,)), view)
        assert not blocks.reshape(-1)[size:].any()


def test_space_for_many_blocks_costs_no_memory_when_a_shard_is_open(tmp_path: Path) -> None:
    root = write_tiny_mixed(tmp_path / "store", slots_per_part=50_000)
    store = Store.open(root)
    assert_whole(store, STORED)
    assert isinstance(store.pixels, BlockSlots)
    shards = store._slots._shards
    assert isinstance(shards, LocalShards)
    assert max(len(shard.index) for shard in shards.opened.values()) <= 8
