"""Large index arrays of a store in a bucket: read in blocks, equal to the folder's, fetched once, and bounded."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from test_remote_store import cache, copied_bytes, copies, folder, requests, upload, url  # noqa: F401 - fixtures

from megatron_deepstack.data.order.mixture import Mixture
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.url import remote_array
from megatron_deepstack.data.store.url.cache import CacheConfig
from megatron_deepstack.data.store.url.remote_array import BY_BLOCKS
from megatron_deepstack.testing.tiny_store import write_tiny_store

BLOCK = 32


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that tiny arrays have many."""
    monkeypatch.setattr(remote_array, "_BLOCK_BYTES", BLOCK)


def asked_for(requests: list, name: str) -> list[tuple[int, int | None]]:  # noqa: F811
    return [(first, length) for source, first, length in requests if f"/{name}/c/" in source]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (number > 1)) for number, name in enumerate(BY_BLOCKS)]
)
def test_rows_are_those_of_the_folder(url: str, folder: Path, cache: CacheConfig, name: str) -> None:  # noqa: F811
    ours, local = Store.open(url, cache=cache).rows(name), Store.open(folder).rows(name)
    assert len(ours) == len(local)
    for part in (slice(None), slice(3, 11), slice(5, 6), slice(4, 4), slice(0, 10**9)):
        np.testing.assert_array_equal(ours[part], local[part])
        assert ours[part].dtype == local[part].dtype
    rows = np.random.default_rng(0).integers(0, len(local), 20)
    np.testing.assert_array_equal(ours.take(rows), local.take(rows))
    np.testing.assert_array_equal(ours.take(rows[:0]), local.take(rows[:0]))
    np.testing.assert_array_equal(ours[len(local) - 1], local[len(local) - 1])
    for wrong in (len(local), -len(local) - 1):
        with pytest.raises(IndexError):
            ours[wrong]
    with pytest.raises(IndexError, match=f"there are {len(local)}"):
        ours.take(np.array([len(local)]))


def test_only_blocks_asked_for_travel_and_only_once(url: str, cache: CacheConfig, requests: list) -> None:  # noqa: F811
    store = Store.open(url, cache=cache)
    assert cache.folder is not None
    copied = {path.parts[-3] for path in Path(cache.folder, "index").rglob("c/*") if path.is_file()}
    assert copied.isdisjoint({name.split("/")[1] for name in BY_BLOCKS})
    store.sample(1)
    tokens = asked_for(requests, "samples/tokens")
    assert tokens
    assert all(length is not None and length <= BLOCK for _, length in tokens)
    assert len(tokens) < -(-len(store.rows("samples/tokens")) * 4 // BLOCK), "not all of them"
    requests.clear()
    Store.open(url, cache=cache).sample(1)
    assert asked_for(requests, "samples/tokens") == []


def test_a_step_is_fetched_before_its_samples_are_read(url: str, cache: CacheConfig, requests: list) -> None:  # noqa: F811
    store = Store.open(url, cache=cache)
    mixture = Mixture([store, Store.open(url, cache=cache)], None)
    wanted = np.array([3, 1, len(store) + 2])
    mixture.prepare(wanted)
    assert asked_for(requests, "samples/tokens")
    requests.clear()
    mixture.prepare(wanted)
    for index in wanted.tolist():
        mixture.sample(index)
    assert requests == []


@pytest.mark.slow
def test_a_block_is_fetched_once_by_all_who_want_it(url: str, cache: CacheConfig, requests: list) -> None:  # noqa: F811
    """Ranks of a replica read the same samples at the same time."""
    stores = [Store.open(url, cache=cache) for _ in range(8)]
    threads = [threading.Thread(target=store.sample, args=(1,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ranges = [request for request in requests if "/samples/" in request[0]]
    assert len(ranges) == len(set(ranges)) > 0


@pytest.mark.slow
def test_blocks_are_bounded_with_everything_else(url: str, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    local = Store.open(folder)
    whole = CacheConfig(str(tmp_path / "whole"))
    Store.open(url, cache=whole)
    index = sum(path.stat().st_size for path in Path(str(whole.folder), "index").rglob("c/*") if path.is_file())
    small = CacheConfig(str(tmp_path / "small"), index + 300)
    store = Store.open(url, cache=small)
    for _ in range(2):
        for number in range(len(local)):
            assert store.sample(number).tokens.tolist() == local.sample(number).tokens.tolist()
            assert store.sample(number).id == local.sample(number).id
            assert copied_bytes(small) + index <= small.limit_bytes
    assert copies(small)


@pytest.mark.slow
def test_a_store_made_again_leaves_no_old_index(url: str, tmp_path: Path, cache: CacheConfig) -> None:  # noqa: F811
    old = Store.open(url, cache=cache)
    (before,) = Path(str(cache.folder), "index").iterdir()
    upload(write_tiny_store(tmp_path / "other", seed=1), url)
    Store.open(url, cache=cache)
    (after,) = Path(str(cache.folder), "index").iterdir()
    assert before != after
    assert len(old.sample_images(1)) >= 0, "what is mapped stays readable"


@pytest.mark.slow
def test_an_index_in_use_is_not_old(url: str, cache: CacheConfig) -> None:  # noqa: F811
    """Reading views counts as use of the copies of the index."""
    import os

    store = Store.open(url, cache=cache)
    (done,) = Path(str(cache.folder), "index").glob("*/.complete")
    os.utime(done, (1, 1))
    store.read_views(0, [0])
    assert done.stat().st_mtime > 1
