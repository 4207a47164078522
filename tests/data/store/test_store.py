"""The reader gives what zarr-python gives, and notices what zarr-python does not."""

import errno
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from megatron_deepstack.data.store import schema, shard_writer, shards, writer
from megatron_deepstack.data.store.codec import checksums
from megatron_deepstack.data.store.index import IndexReader
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import ImageStatus, PixelsShape
from megatron_deepstack.errors import DataError, StoreError

PIXELS = PixelsShape(num_parts=3, slots_per_part=6, crop_size=8)
COUNTS = [[2, 3], [5], [1, 0, 4]]
"""Views of the images of each part; the one with none is quarantined."""
TOKENS = [[1, 5, 6], [], [1, -200, 7, 8, 2]]
IMAGES = [[], [0, 5], [2]]
ATTRIBUTES = {
    "format": schema.FORMAT,
    "version": schema.VERSION,
    "plan_hash": "0" * 64,
    "processor": {"crop_size": 8},
    "tokenizer": {"sha256": "1" * 64},
    "counts": {"images": 6, "samples": 3},
    "complete": True,
}


def write_store(root: Path) -> None:
    """A store written by hand, part by part."""
    generator = np.random.default_rng(0)
    counts = [count for part in COUNTS for count in part]
    sums = np.zeros((PIXELS.num_parts, PIXELS.slots_per_part), dtype=np.uint32)
    starts = []
    for part, part_counts in enumerate(COUNTS):
        with shard_writer.open_shard(root, part, PIXELS) as shard:
            for count in part_counts:
                used = shard.used
                starts.append(part * PIXELS.slots_per_part + used)
                views = generator.integers(0, 256, (count, *PIXELS.slot_shape), dtype=np.uint8)
                sums[part, used : used + count] = checksums(views)
                shard.append(views)
    with writer.open_index(root) as index:
        index.append("images/start", starts)
        index.append("images/count", counts)
        index.append("images/grid", [[1, max(0, count - 1)] for count in counts])
        index.append("images/size", [[10, 20]] * len(counts))
        index.append("images/status", [0, 1, 0, 0, 2, 0])
        index.append("images/sha256", np.zeros((len(counts), 32), dtype=np.uint8))
        index.append("images/crc32c", sums)
        for name, rows in (
            ("images/path", [f"bild{n}.jpg".encode() for n in range(6)]),
            ("samples/id", [b"a", "ü".encode(), b"c"]),
            ("samples/tokens", TOKENS),
            ("samples/images", IMAGES),
        ):
            index.append(name, [value for row in rows for value in row])
            index.append(f"{name}_offsets", np.cumsum([0, *(len(row) for row in rows)]))
        index.append("samples/loss_mask", [value % 2 for row in TOKENS for value in row])
    writer.write_skeleton(root, PIXELS, ATTRIBUTES)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store") / "store"
    write_store(root)
    return root


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "store"))


def test_every_view_equals_zarr_pythons(finished: Path) -> None:
    ours, theirs = Store.open(finished), zarr.open_group(finished, mode="r")
    pixels = theirs["images/pixels"]
    assert pixels.shape == (18, 8, 8, 3)
    for number in range(ours.num_images):
        image = ours.image(number)
        views = ours.read_views(number, range(image.count))
        np.testing.assert_array_equal(views, pixels[image.start : image.start + image.count])
    assert ours.read_views(2, range(5)).any()


def test_every_index_array_equals_zarr_pythons(finished: Path) -> None:
    theirs = zarr.open_group(finished, mode="r")
    for name in schema.index_names(schema.VERSION):
        array = theirs[name][:]
        np.testing.assert_array_equal(IndexReader(finished, name)[:], array)
    assert theirs.attrs["format"] == schema.FORMAT
    assert sorted(theirs["samples"].array_keys()) == sorted(a.name.split("/")[1] for a in schema.SAMPLE_ARRAYS)


def test_samples_and_images(finished: Path) -> None:
    opened = Store.open(finished)
    assert (len(opened), opened.num_images, opened.crop_size) == (3, 6, 8)
    assert [opened.sample(n).tokens.tolist() for n in range(3)] == TOKENS
    assert [list(opened.sample_images(n)) for n in range(3)] == IMAGES
    assert opened.sample(1).id == "ü"
    assert opened.sample(2).images == (2,)
    assert opened.image(np.int64(1)) == opened.image(1)  # type: ignore[arg-type]
    assert opened.sample(2).loss_mask.dtype == np.uint8
    assert opened.lengths().tolist() == [3, 0, 5]
    image = opened.image(1)
    assert (image.start, image.count, image.grid, image.size) == (2, 3, (1, 2), (10, 20))
    assert (image.status, image.path) == (ImageStatus.FLAGGED, "bild1.jpg")
    with pytest.raises(ValueError, match="read-only"):
        opened.sample(0).tokens[0] = 9


@pytest.mark.parametrize("views", [[0], [4, 0], [1, 2, 3], [3, 3, 0, 1], []])
def test_views_come_in_the_order_asked_for(finished: Path, views: list[int]) -> None:
    opened = Store.open(finished)
    np.testing.assert_array_equal(opened.read_views(2, views), opened.read_views(2, range(5))[views])


@pytest.mark.parametrize("read", [lambda s: s.sample(3), lambda s: s.sample(-1), lambda s: s.image(6)])
def test_numbers_outside_are_index_errors(finished: Path, read: Callable[[Store], object]) -> None:
    with pytest.raises(IndexError, match=r"was asked for; there are [36]"):
        read(Store.open(finished))


def test_a_view_the_image_lacks(finished: Path) -> None:
    with pytest.raises(
        StoreError, match=r"image 0 \('bild0.jpg'\) of store .* has 2 views; views \[2\] were asked for"
    ):
        Store.open(finished).read_views(0, [2])


def test_copies_in_other_processes_and_threads(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 1)
    opened = pickle.loads(pickle.dumps(Store.open(finished, verify_checksums=True)))
    expected = {number: opened.read_views(number, [0]) for number in (0, 2, 5)}
    numbers = [(0, 2, 5)[n % 3] for n in range(300)]
    with ThreadPoolExecutor(8) as pool:
        for number, views in zip(numbers, pool.map(lambda n: opened.read_views(n, [0]), numbers), strict=True):
            np.testing.assert_array_equal(views, expected[number])


def descriptors(root: Path) -> int:
    """Shards below `root` that this process has open."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    files = [os.readlink(link) for link in links if os.path.lexists(link)]
    return sum(file.startswith(f"{root}/") and "/pixels/c/" in file for file in files)


def test_all_stores_of_a_process_share_one_limit(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 4)
    stores = [Store.open(shutil.copytree(finished, tmp_path / str(number))) for number in range(3)]
    for _ in range(2):
        for store in stores:
            for image in (0, 2, 5):
                assert store.read_views(image, [0]).any()
                assert descriptors(tmp_path) <= 4
    assert descriptors(tmp_path) == 4
    stores.clear()
    del store
    assert descriptors(tmp_path) == 0, "a store that is gone holds nothing open"


def test_a_forked_child_reads_though_a_thread_of_its_parent_held_the_lock(finished: Path) -> None:
    opened = Store.open(finished)
    expected = [opened.read_views(number, [0]).tobytes() for number in (0, 2)]
    with shards._USES.lock:
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            same = [opened.read_views(number, [0]).tobytes() for number in (0, 2)] == expected
            os._exit(0 if same and opened.read_views(5, [0]).any() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert opened.read_views(5, [0]).any()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE], ids=["EMFILE", "ENFILE"])
def test_too_many_open_files_are_not_the_shards_fault(
    finished: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    opened = Store.open(finished)
    monkeypatch.setattr(shards, "open", fail, raising=False)
    with pytest.raises(DataError, match=r"c/1/0/0/0: could not be opened: .*not to blame: .* \(`ulimit -n`\)"):
        opened.read_views(2, [0])
    monkeypatch.setattr(np, "memmap", fail)
    with pytest.raises(DataError, match=r"start/c/0: could not be opened: .*not to blame"):
        Store.open(finished)


def test_index_arrays_of_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "INDEX_ROWS_PER_CHUNK", 4)
    write_store(tmp_path)
    opened, theirs = Store.open(tmp_path), zarr.open_group(tmp_path, mode="r")
    assert theirs["samples/tokens"].chunks == (4,)
    for name in schema.index_names(schema.VERSION):
        np.testing.assert_array_equal(IndexReader(tmp_path, name)[:], theirs[name][:])
    tokens = IndexReader(tmp_path, "samples/tokens")
    assert np.shares_memory(tokens[4:6], tokens[5:7]), "within a chunk nothing is copied"
    assert tokens[2:6].tolist() == theirs["samples/tokens"][2:6].tolist()
    for rows in ([0, 3, 4, 7], [5], [7, 0, 7, 1], []):
        np.testing.assert_array_equal(tokens.take(np.array(rows, np.int64)), theirs["samples/tokens"][:][rows])
    for wrong in ([8], [-1]):
        with pytest.raises(IndexError, match="were asked for; there are 8"):
            tokens.take(np.array(wrong))
    assert [opened.sample(n).tokens.tolist() for n in range(3)] == TOKENS


def test_a_flipped_byte_is_noticed_and_zarr_python_would_not(copied: Path) -> None:
    before = zarr.open_group(copied, mode="r")["images/pixels"][9]
    shard = copied / schema.shard_path(1)
    data = bytearray(shard.read_bytes())
    data[3 * PIXELS.slot_bytes + 50] ^= 0x10
    shard.write_bytes(data)
    assert (zarr.open_group(copied, mode="r")["images/pixels"][9] != before).sum() == 1, "the fault did not take"
    opened = Store.open(copied)
    opened.read_views(2, [0, 1, 2, 4])
    with pytest.raises(StoreError, match=r"c/1/0/0/0: view 3 of image 2 \('bild2.jpg'\).* is damaged: its crc32c is"):
        opened.read_views(2, range(5))
    assert Store.open(copied, verify_checksums=False).read_views(2, [3]).any()


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a store")
    with pytest.raises(StoreError, match=r"notes\.txt: is a file, and a store is a folder"):
        Store.open(tmp_path / "notes.txt")


def test_a_missing_shard_is_noticed_and_zarr_python_reads_zeros(copied: Path) -> None:
    (copied / schema.shard_path(1)).unlink()
    assert not zarr.open_group(copied, mode="r")["images/pixels"][6:11].any()
    opened = Store.open(copied)
    opened.read_views(0, [0])
    with pytest.raises(
        StoreError, match=r"c/1/0/0/0: the shard cannot be opened: No such file.*It holds image 2 \('bild2"
    ):
        opened.read_views(2, [0])


@pytest.mark.parametrize("call", ["preadv", "fstat", "pread"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE], ids=["EIO", "ESTALE"])
def test_a_disk_that_fails_is_a_fault_of_the_shard(
    finished: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    opened = Store.open(finished)
    with monkeypatch.context() as broken:
        broken.setattr(shards.os, call, fail)
        message = rf"c/1/0/0/0: the shard cannot be read: {os.strerror(code)}\. It holds image 2 \('bild2"
        with pytest.raises(StoreError, match=message):
            opened.read_views(2, [0])
    opened.read_views(2, [0])


@pytest.mark.parametrize(("length", "message"), [(100, "cut off"), (0, "cut off"), (-1, "damaged or cut off")])
def test_a_short_shard_is_noticed(copied: Path, length: int, message: str) -> None:
    shard = copied / schema.shard_path(0)
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(StoreError, match=message):
        Store.open(copied).read_views(0, [0])


def test_a_chunk_that_was_never_written_is_noticed(copied: Path) -> None:
    with shard_writer.open_shard(copied, 1, PIXELS) as shard:
        shard.append(np.ones((2, *PIXELS.slot_shape), dtype=np.uint8))
    with pytest.raises(StoreError, match="slot 2 was never written"):
        Store.open(copied).read_views(2, [2])


def change_attributes(root: Path, **changes: object) -> None:
    writer.write_attributes(root, {**ATTRIBUTES, **changes})


def change_metadata(root: Path, name: str, **changes: object) -> None:
    path = root / name / "zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda root: (root / "zarr.json").unlink(), "not a store: it has no zarr.json"),
        (lambda root: (root / "zarr.json").write_text("{"), "zarr.json: not JSON"),
        (lambda root: change_attributes(root, complete=False), "has not finished. Run the same `preprocess` command"),
        (lambda root: change_attributes(root, version=7), "format version 7, this program reads 1 and 2"),
        (lambda root: change_attributes(root, format="other"), "its `format` is 'other'"),
        (lambda root: writer.write_attributes(root, {}), "its `format` is None"),
        (
            lambda root: change_attributes(root, counts={"images": 6, "samples": 4}),
            "tokens_offsets has 4 rows, 5 expected",
        ),
        (lambda root: (root / "samples/tokens/c/0").unlink(), r"samples/tokens/c/0: cannot be read"),
        (lambda root: (root / "images/start/c/0").write_bytes(b""), r"images/start/c/0: has 0 bytes, expected 48"),
        (
            lambda root: change_metadata(root, "images/count", data_type="int64"),
            "data_type is 'int64', expected 'uint16'",
        ),
        (lambda root: change_attributes(root, counts={}), "images/start has 6 rows, -1 expected"),
        (
            lambda root: change_metadata(root, "samples/tokens_offsets", shape=[0]),
            "codecs|chunk_grid|contradicts itself",
        ),
        (lambda root: change_metadata(root, "images/count", shape="x"), "its shape is 'x'"),
        (lambda root: change_metadata(root, "images/pixels", shape=[]), "metadata lacks shape or shards"),
        (lambda root: change_metadata(root, "images/pixels", codecs=[]), r"codecs is \[\], expected"),
        (lambda root: shutil.rmtree(root / "images/grid"), r"images/grid/zarr.json: cannot be read"),
    ],
)
def test_what_is_no_finished_store_is_refused(copied: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copied)
    with pytest.raises(StoreError, match=message):
        Store.open(copied)


def test_a_file_that_fails_half_way_never_appears(tmp_path: Path) -> None:
    def fail() -> None:
        with shard_writer.open_shard(tmp_path, 0, PIXELS) as shard:
            shard.append(np.ones((2, *PIXELS.slot_shape), dtype=np.uint8))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written: File exists"):
        writer.write_json(tmp_path / "file" / "x.json", {})
