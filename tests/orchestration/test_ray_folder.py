"""The folder of a Ray of our own: the first place that will do, and what is said of those that will not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_deepstack.errors import ClusterError
from orchestration import ray_folder
from orchestration.ray_folder import LONGEST, Candidate, choose, places

Spoil = Callable[[Path, pytest.MonkeyPatch], Path]


@pytest.fixture
def short() -> Path:
    """A place whose path is short enough, unlike pytest's own folders."""
    return Path("/tmp")


def too_long(folder: Path, _: pytest.MonkeyPatch) -> Path:
    path = folder / ("x" * 98)
    path.mkdir()
    return path


def too_long_in_bytes(folder: Path, _: pytest.MonkeyPatch) -> Path:
    path = Path(f"/tmp/{'ä' * (LONGEST - 10)}")
    assert len(str(path)) < LONGEST
    return path


def not_there(folder: Path, _: pytest.MonkeyPatch) -> Path:
    return Path("/tmp/gone/nothing")


def a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "f").touch()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Path, "absolute", lambda path: path)  # a short name for a file in pytest's long folder
    return Path("f")


def disk(**facts: int) -> Spoil:
    def spoil(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        found = os.statvfs
        this = SimpleNamespace(**{"f_bavail": 1 << 20, "f_frsize": 4096, "f_files": 9, "f_favail": 9, **facts})
        monkeypatch.setattr(ray_folder.os, "statvfs", lambda path: this if Path(path) == Path("/var") else found(path))
        return Path("/var")

    return spoil


def refuses(number: int) -> Spoil:
    def spoil(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        make = ray_folder.hold_new

        def hold_new(path: Path, kind: str) -> object:
            if path == Path("/var"):
                raise OSError(number, os.strerror(number), str(path))
            return make(path, kind)

        monkeypatch.setattr(ray_folder, "hold_new", hold_new)
        return Path("/var")

    return spoil


CASES = {
    "too long": (too_long, rf"is too long for Ray's sockets: \d+ bytes, expected at most {LONGEST}"),
    "too long in bytes": (too_long_in_bytes, rf"is too long for Ray's sockets: \d+ bytes, expected at most {LONGEST}"),
    "not there": (not_there, "is not there"),
    "a file": (a_file, "is not a folder"),
    "full": (disk(f_bavail=10), r"is on a full disk: 0\.0 MiB free, expected 32 MiB"),
    "no inodes": (disk(f_favail=0), r"takes no more files \(no free inodes\)"),
    "read-only": (refuses(errno.EROFS), "cannot be written: Read-only file system"),
    "not ours": (refuses(errno.EACCES), "cannot be written: Permission denied"),
    "quota": (refuses(errno.EDQUOT), "is full: Disk quota exceeded"),
}


@pytest.mark.parametrize(("spoil", "words"), CASES.values(), ids=CASES.keys())
def test_a_place_that_will_not_do(
    spoil: Spoil, words: str, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is passed over with its reason; where there is no other, the reason and the remedy are the error."""
    path = spoil(tmp_path, monkeypatch)
    asked = Candidate(path, "TMPDIR")
    held, said = choose([asked, Candidate(short, "")])
    with held:
        assert held.path.parent == short
        (line,) = said
        assert line.startswith(f"TMPDIR={path} ")
        assert line.endswith(f"; Ray's files go to {held.path}")
    assert not held.path.exists()
    with pytest.raises(ClusterError, match=words) as caught:
        choose([asked])
    assert f"\n  TMPDIR={path} " in str(caught.value)
    assert f"Set RAY_TMPDIR to a folder that you may write, whose path has at most {LONGEST} bytes, with 32 MiB" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("environment", "order"),
    [
        ({}, ["/tmp", "/var/tmp", "/dev/shm"]),
        ({"TMPDIR": "/scratch/7"}, ["TMPDIR=/scratch/7", "/tmp", "/var/tmp", "/dev/shm"]),
        ({"TMPDIR": "/tmp", "RAY_TMPDIR": "/r"}, ["RAY_TMPDIR=/r", "TMPDIR=/tmp", "/var/tmp", "/dev/shm"]),
        ({"TMPDIR": ""}, ["/tmp", "/var/tmp", "/dev/shm"]),
    ],
)
def test_the_users_places_come_first(environment: dict[str, str], order: list[str]) -> None:
    assert [place.name for place in places(environment)] == order


def test_a_place_of_every_system_is_passed_over_without_a_word(short: Path) -> None:
    held, said = choose([Candidate(Path("/nothing"), ""), Candidate(short, "")])
    with held:
        assert said == ()


def test_the_longest_place_fits() -> None:
    assert LONGEST + len(f"/{ray_folder._KIND}-999/{ray_folder._INNER}{ray_folder._BELOW}") == 107
