"""Stores in a bucket, read through a bounded cache: equal to the folder's, bounded, shared, and honest about faults."""

import os
import pickle
import shutil
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import METADATA_FILE, shard_path
from megatron_deepstack.data.store.url import remote
from megatron_deepstack.data.store.url.cache import CacheConfig
from megatron_deepstack.errors import LocationError, StoreError
from megatron_deepstack.testing.tiny_store import GRIDS, write_tiny_store

VIEW_BYTES = 16 * 16 * 3
STORED = [number for number, grid in enumerate(GRIDS) if grid]


def upload(folder: Path, url: str) -> str:
    import s3fs

    s3fs.S3FileSystem().put(f"{folder}/", f"{url}/", recursive=True)
    return url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_store(tmp_path / "local")


@pytest.fixture
def url(folder: Path, bucket: str) -> str:
    return upload(folder, f"{bucket}/deep/store.zarr")


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(str(tmp_path / "cache"), 1 << 30)


def all_views(store: Store) -> np.ndarray:
    return store.read_many([(number, range(store.image(number).count)) for number in STORED])


def copies(cache: CacheConfig) -> list[Path]:
    assert cache.folder is not None
    return [path for path in Path(cache.folder, "copies").rglob("*") if path.is_file()]


def copied_bytes(cache: CacheConfig) -> int:
    return sum(path.stat().st_size for path in copies(cache))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int | None]]:
    """Every object or range read from now on."""
    seen: list[tuple[str, int, int | None]] = []
    read = Location.read_bytes

    def spy(self: Location, first: int = 0, length: int | None = None) -> bytes:
        seen.append((str(self), first, length))
        return read(self, first, length)

    monkeypatch.setattr(Location, "read_bytes", spy)
    return seen


@pytest.mark.parametrize("compression", Compression)
def test_equal_to_the_folder(tmp_path: Path, bucket: str, cache: CacheConfig, compression: Compression) -> None:
    here = write_tiny_store(tmp_path / "here", compression=compression)
    ours = Store.open(upload(here, f"{bucket}/x.zarr"), cache=cache)
    local = Store.open(here)
    for _ in range(2):
        np.testing.assert_array_equal(all_views(ours), all_views(local))
    np.testing.assert_array_equal(ours.read_views(6, [3, 0, 3]), local.read_views(6, [3, 0, 3]))
    assert [ours.sample(n).tokens.tolist() for n in range(len(ours))] == [
        local.sample(n).tokens.tolist() for n in range(len(local))
    ]
    assert ours.name == f"{bucket}/x.zarr"


def test_what_was_read_once_is_not_asked_for_again(url: str, cache: CacheConfig, requests: list) -> None:
    first = Store.open(url, cache=cache)
    expected = all_views(first)
    ranges = [request for request in requests if "/pixels/c/" in request[0]]
    assert len(ranges) == 2 * 3, "of each shard its index and one range of neighbouring views"
    requests.clear()
    again = Store.open(url, cache=cache)
    np.testing.assert_array_equal(all_views(again), expected)
    assert [request[0] for request in requests] == [f"{url}/{METADATA_FILE}"], "the store's own document alone"


def test_only_the_views_asked_for_travel(url: str, cache: CacheConfig, requests: list) -> None:
    Store.open(url, cache=cache).read_views(0, [1, 2])
    assert [request[2] for request in requests if "/pixels/c/" in request[0]][1:] == [2 * VIEW_BYTES]


@pytest.mark.slow
def test_a_small_cache_stays_small_and_the_answer_the_same(url: str, folder: Path, tmp_path: Path) -> None:
    small = CacheConfig(str(tmp_path / "small"), 10 * VIEW_BYTES)
    store, local = Store.open(url, cache=small), Store.open(folder)
    seen = set()
    for number in np.random.default_rng(0).choice(STORED, 60).tolist():
        views = range(store.image(number).count)
        np.testing.assert_array_equal(store.read_views(number, views), local.read_views(number, views))
        assert copied_bytes(small) <= small.limit_bytes
        seen |= {path.name for path in copies(small)}
    assert len(seen) > 10, "copies were evicted"


def read_all(url: str, cache: CacheConfig, seed: int) -> bool:
    """In a process of its own: every image again and again, in an order of its own."""
    store = Store.open(url, cache=cache)
    first = {}
    for number in np.random.default_rng(seed).choice(STORED, 60).tolist():
        views = store.read_views(number, range(store.image(number).count)).tobytes()
        assert first.setdefault(number, views) == views
    return True


@pytest.mark.slow
def test_processes_share_a_small_cache(url: str, tmp_path: Path) -> None:
    small = CacheConfig(str(tmp_path / "small"), 10 * VIEW_BYTES)
    with get_context("spawn").Pool(2) as pool:
        assert all(pool.starmap(read_all, [(url, small, seed) for seed in range(4)]))
    assert 0 < copied_bytes(small) <= small.limit_bytes
    assert not [path for path in copies(small) if path.name.endswith(".partial")]


@pytest.mark.slow
def test_after_a_fork_and_after_a_pickle(url: str, folder: Path, cache: CacheConfig) -> None:
    store = Store.open(url, cache=cache)
    store.read_views(0, [0])
    expected = all_views(Store.open(folder)).tobytes()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).read_views(2, [0]), store.read_views(2, [0]))
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(send, b"1" if all_views(store).tobytes() == expected else b"0")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(receive, 1) == b"1"


def test_a_damaged_copy_is_fetched_again(url: str, cache: CacheConfig) -> None:
    store = Store.open(url, cache=cache)
    expected = store.read_views(0, range(5))
    for path in copies(cache):
        data = bytearray(path.read_bytes())
        data[3] ^= 1
        path.write_bytes(data)
    np.testing.assert_array_equal(Store.open(url, cache=cache).read_views(0, range(5)), expected)
    for path in copies(cache):
        path.write_bytes(path.read_bytes()[:-1])
    np.testing.assert_array_equal(Store.open(url, cache=cache).read_views(0, range(5)), expected)


def change_object(url: str, path: str, change: Callable[[bytes], bytes | None]) -> None:
    location = Location.parse(url).child(path)
    data = change(location.read_bytes())
    location.delete()
    if data is not None:
        with location.write() as file:
            file.write(data)


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (shard_path(0), lambda data: None, r"c/0/0/0/0: the shard cannot be read: .* It holds image 0 \('tiny/0.jpg'"),
        (shard_path(0), lambda data: data[:-1], r"c/0/0/0/0: the shard's index is damaged or cut off"),
        (shard_path(0), lambda data: bytes([data[0] ^ 1]) + data[1:], r"view 0 of image 0 .* is damaged: its crc32c"),
        ("samples/tokens/c/0", lambda data: None, "samples/tokens/c/0: cannot be read: no such object"),
        ("samples/tokens/c/0", lambda data: data[:-4], "samples/tokens/c/0: has .* bytes, expected"),
        (METADATA_FILE, lambda data: None, "not a store: it has no zarr.json"),
        (METADATA_FILE, lambda data: data.replace(b'"complete": true', b'"complete": false'), "has not finished"),
    ],
)
@pytest.mark.slow
def test_faults_in_the_bucket(url: str, cache: CacheConfig, path: str, change: Callable, message: str) -> None:
    change_object(url, path, change)
    with pytest.raises(StoreError, match=message):
        Store.open(url, cache=cache).read_views(0, [0])


@pytest.mark.slow
def test_a_store_written_anew_is_not_mixed_with_old_copies(url: str, tmp_path: Path, cache: CacheConfig) -> None:
    before = all_views(Store.open(url, cache=cache))
    other = write_tiny_store(tmp_path / "other", seed=1)
    upload(other, url)
    after = all_views(Store.open(url, cache=cache))
    np.testing.assert_array_equal(after, all_views(Store.open(other)))
    assert (before != after).any()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("samples/images/c/0", lambda path: os.truncate(path, 0), r"images/c/0: has 0 bytes, expected \d+\."),
        pytest.param(
            "samples/images/c/0", Path.unlink, r"images/c/0: cannot be read: No such file", marks=pytest.mark.slow
        ),
        pytest.param(
            f"images/grid/{METADATA_FILE}",
            lambda path: path.write_bytes(bytes(40)),
            r"zarr.json: not JSON",
            marks=pytest.mark.slow,
        ),
        ("samples/id_offsets/c/0", lambda path: path.write_bytes(bytes(path.stat().st_size)), "contradicts itself"),
    ],
    ids=["truncated", "gone", "not JSON", "zeros"],
)
def test_a_torn_copy_of_the_index_is_named_and_can_be_deleted(
    url: str, cache: CacheConfig, name: str, damage: Callable[[Path], object], message: str
) -> None:
    Store.open(url, cache=cache)
    assert cache.folder is not None
    (folder,) = Path(cache.folder, "index").iterdir()
    damage(folder / name)
    with pytest.raises(StoreError, match=rf"{message}.* The copy of {url} in {folder} is damaged, .*: delete that"):
        Store.open(url, cache=cache)
    shutil.rmtree(folder)
    assert len(all_views(Store.open(url, cache=cache)))


@pytest.mark.slow
def test_a_copy_is_on_disk_before_it_counts_as_complete(
    url: str, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache.folder is not None
    synced: set[str] = set()
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        assert not list(Path(str(cache.folder), "index").glob("*/.complete"))
        synced.add(path)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    Store.open(url, cache=cache)
    (folder,) = Path(cache.folder, "index").iterdir()
    there = {str(path) for path in folder.rglob("*")} - {str(folder / ".complete")}
    assert there | {str(folder)} <= synced


@pytest.mark.parametrize("step", ["open", "sync"])
def test_a_full_cache_folder_is_named(url: str, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        if step == "open":
            broken.setattr(remote, "open", full, raising=False)
        else:
            broken.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=f"{cache.folder}: copies .*: No space left on device.*data.cache_dir"):
            Store.open(url, cache=cache)
    assert len(all_views(Store.open(url, cache=cache))), "what was left half-done is done again"


@pytest.mark.slow
def test_indices_are_replaced_by_other_threads_while_one_reads(url: str, folder: Path, cache: CacheConfig) -> None:
    store, local = Store.open(url, cache=cache), Store.open(folder)
    shards = store._slots._shards
    assert isinstance(shards, remote.RemoteShards)
    read_copies = remote.RemoteShards._read_copies

    def replaced(*arguments: Any) -> Any:
        shards._indices = {}
        return read_copies(shards, *arguments)

    shards._read_copies = replaced  # type: ignore[method-assign]
    np.testing.assert_array_equal(all_views(store), all_views(local))


def test_nothing_there(bucket: str, cache: CacheConfig) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        Store.open(f"{bucket}/nothing.zarr", cache=cache)


def test_a_lost_connection_is_no_damage(url: str, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(url, cache=cache)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", nobody)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(LocationError, match="Check network"):
        store.read_views(0, [0])
    monkeypatch.undo()
    s3fs.S3FileSystem.clear_instance_cache()
    store.read_views(0, [0])


def test_a_cache_too_small_for_one_view(bucket: str, tmp_path: Path) -> None:
    few = upload(write_tiny_store(tmp_path / "few", grids=GRIDS[:1], samples=((0,),)), f"{bucket}/few.zarr")
    store = Store.open(few, cache=CacheConfig(str(tmp_path / "none"), 700))
    with pytest.raises(StoreError, match=r"data.cache_gib allows .* less than the 768 bytes of one copy; raise it"):
        store.read_views(0, [0])


@pytest.mark.slow
def test_a_cache_too_small_for_the_index(url: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=rf"data.cache_gib .* less than the \d+ bytes of the index of {url}; raise"):
        Store.open(url, cache=CacheConfig(str(tmp_path / "none"), 100))


def test_a_cache_folder_that_cannot_be_written(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"data\.cache_dir"):
        Store.open(url, cache=CacheConfig(str(tmp_path / "file"), 1 << 20))
