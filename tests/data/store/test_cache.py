"""The folder of copies: bounded, shared, the least recently used go first, and its lock is held for moments only."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from megatron_deepstack.data.store.url.cache import BoundedFolder, CacheConfig
from megatron_deepstack.errors import CacheError, StoreError


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = BoundedFolder(CacheConfig(str(tmp_path), 100))
    for name in "abcde":
        cache.keep(name, name.encode() * 20)
        os.utime(tmp_path / "copies" / name, ns=(ord(name), ord(name)))
    buffer = memoryview(bytearray(20))
    assert cache.read_into("a", buffer), "a is used again"
    cache.keep("f", b"f" * 20)
    assert sorted(path.name for path in (tmp_path / "copies").iterdir()) == ["a", "d", "e", "f"]
    assert (cache.read_into("b", buffer), cache.read_into("f", buffer), bytes(buffer)) == (False, True, b"f" * 20)


def test_an_evicted_copy_can_be_read_to_its_end(tmp_path: Path) -> None:
    cache = BoundedFolder(CacheConfig(str(tmp_path), 100))
    cache.keep("a", b"a" * 60)
    with open(tmp_path / "copies/a", "rb") as file:
        cache.keep("b", b"b" * 60)
        assert not (tmp_path / "copies/a").exists()
        assert file.read() == b"a" * 60


@pytest.mark.parametrize("counter", [b"", b"torn \0", b"99999999"])
def test_a_lost_counter_is_counted_anew(tmp_path: Path, counter: bytes) -> None:
    cache = BoundedFolder(CacheConfig(str(tmp_path), 100))
    for name in "abc":
        cache.keep(name, b"x" * 30)
    if counter:
        (tmp_path / "usage").write_bytes(counter)
    cache.keep("d", b"x" * 30)
    assert sum(path.stat().st_size for path in (tmp_path / "copies").iterdir()) <= 100
    assert int((tmp_path / "usage").read_text()) <= 100


def test_leftovers_of_a_killed_process_go_after_an_hour(tmp_path: Path) -> None:
    cache = BoundedFolder(CacheConfig(str(tmp_path), 100))
    for name, mtime in (("old.1.1.partial", 1), ("new.1.1.partial", None)):
        path = tmp_path / "copies" / name
        path.write_bytes(b"x" * 40)
        if mtime:
            os.utime(path, (mtime, mtime))
    (tmp_path / "usage").write_text("100")
    cache.keep("a", b"x" * 30)
    assert sorted(path.name for path in (tmp_path / "copies").iterdir()) == ["a", "new.1.1.partial"]


def test_a_copy_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    cache = BoundedFolder(CacheConfig(str(tmp_path), 100))
    (tmp_path / "copies" / "a").mkdir()
    with pytest.raises(CacheError, match=r"Is a directory\. Make room, name another folder with data\.cache_dir"):
        cache.read_into("a", memoryview(bytearray(20)))


def folders_below(path: Path) -> list[Path]:
    return [folder for folder in path.rglob("*") if folder.is_dir()]


@pytest.mark.slow
def test_folders_do_not_grow_with_the_copies(tmp_path: Path) -> None:
    """Names of 3,000 shards; folders that lose their last copy go when room is made."""
    cache = BoundedFolder(CacheConfig(str(tmp_path), 2000))
    for part in range(3000):
        cache.keep(f"store/{part}/0", b"x" * 10)
    folders = folders_below(tmp_path / "copies")
    assert len(folders) <= 256
    cache.keep("store/0/1", b"x" * 2000)
    assert [path for path in folders_below(tmp_path / "copies") if not list(path.iterdir())] == []
    assert len(folders_below(tmp_path / "copies")) == 1


def test_folders_of_an_earlier_version_go(tmp_path: Path) -> None:
    cache = BoundedFolder(CacheConfig(str(tmp_path), 100))
    for part in range(5):
        (tmp_path / f"copies/store/{part}").mkdir(parents=True)
    (tmp_path / "copies/store/0/7").write_bytes(b"x" * 50)
    (tmp_path / "usage").write_text("50")
    cache.keep("a", b"x" * 90)
    assert [path.name for path in (tmp_path / "copies").iterdir()] == ["a"]


def test_a_folder_that_goes_while_a_copy_comes_is_made_again(tmp_path: Path) -> None:
    """Threads that keep copies, while another removes every empty folder again and again."""
    cache = BoundedFolder(CacheConfig(str(tmp_path), 1 << 20))
    done, failed = threading.Event(), []

    def keep(first: int) -> None:
        try:
            for number in range(first, first + 300):
                cache.keep(f"store/{number}/0", b"x")
                cache.drop(f"store/{number}/0")
        except Exception as error:
            failed.append(error)

    def remove() -> None:
        while not done.is_set():
            cache._remove_empty_folders()

    remover = threading.Thread(target=remove)
    keepers = [threading.Thread(target=keep, args=(1000 * k,)) for k in range(3)]
    for thread in (remover, *keepers):
        thread.start()
    for thread in keepers:
        thread.join()
    done.set()
    remover.join()
    assert failed == []


def test_others_go_on_while_one_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BoundedFolder(CacheConfig(str(tmp_path), 100))
    cache.keep("old", b"x" * 60)
    looking, go_on = threading.Event(), threading.Event()
    remove_oldest = BoundedFolder._remove_oldest

    def slow(self: BoundedFolder, wanted: int) -> int:
        looking.set()
        assert go_on.wait(60)
        return remove_oldest(self, wanted)

    monkeypatch.setattr(BoundedFolder, "_remove_oldest", slow)
    large = threading.Thread(target=cache.keep, args=("large", b"x" * 90))
    large.start()
    assert looking.wait(60)
    cache.keep("small", b"x" * 5)
    assert cache.has("small"), "kept while another walks over all copies"
    go_on.set()
    large.join()
    assert cache.has("large")
    held = sum(path.stat().st_size for path in (tmp_path / "copies").iterdir())
    assert held <= int((tmp_path / "usage").read_text()) <= 100


def test_without_room_a_copy_is_not_kept(tmp_path: Path) -> None:
    """What others are writing is not removed, and the limit holds."""
    cache = BoundedFolder(CacheConfig(str(tmp_path), 100))
    (tmp_path / "copies/b.1.1.partial").write_bytes(b"x" * 90)
    (tmp_path / "usage").write_text("90")
    cache.keep("a", b"x" * 30)
    assert not cache.has("a")
    assert [path.name for path in (tmp_path / "copies").iterdir()] == ["b.1.1.partial"]


@pytest.mark.parametrize(("hours", "stays"), [(0, True), (2, False)], ids=["in use", "unused"])
def test_held_folders_go_when_unused_for_an_hour(tmp_path: Path, hours: int, stays: bool) -> None:
    cache = BoundedFolder(CacheConfig(str(tmp_path), 100))
    folder = cache.held / "store"
    folder.mkdir(parents=True)
    (folder / "array").write_bytes(b"x" * 80)
    (folder / ".complete").touch()
    then = (folder / ".complete").stat().st_mtime - hours * 3600 - 1
    os.utime(folder / ".complete", (then, then))
    cache.reserve_held(80, "the index")
    cache.keep("a", b"x" * 50)
    assert folder.exists() == stays
    assert cache.has("a") != stays


def test_a_held_folder_larger_than_the_limit(tmp_path: Path) -> None:
    cache = BoundedFolder(CacheConfig(str(tmp_path), 100))
    with pytest.raises(StoreError, match=r"data.cache_gib allows .* less than the 101 bytes of the index of x; raise"):
        cache.reserve_held(101, "the index of x")
