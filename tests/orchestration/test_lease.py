"""The lease on a store: refused while its owner lives, taken over when it is gone, in a folder and in a bucket."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from megatron_deepstack.data import location
from megatron_deepstack.data.location import Location
from megatron_deepstack.errors import StoreError
from megatron_deepstack.platform.files import rename
from megatron_deepstack.platform.processes.owner import this_process
from orchestration.preprocess.driver import lease
from orchestration.preprocess.driver.lease import LEASE_FILE, Owner, hold_lease, read_token


@pytest.fixture(params=["folder", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "folder":
        return Location.parse(tmp_path / "store")
    return Location.parse(f"{request.getfixturevalue('bucket')}/store")


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 1.0)


def write_lease(root: Location, **changes: Any) -> Owner:
    """A lease that this process might have left, with changes."""
    owner = owner_of(**changes)
    root.child(LEASE_FILE).create(json.dumps(asdict(owner)).encode())
    return owner


def when(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    wait_until(condition)


def test_one_holds_it_and_gives_it_back(root: Location) -> None:
    with hold_lease(root) as held:
        assert read_token(root) == held.owner.token
        holder = f"process {os.getpid()} on {os.uname().nodename}"
        with pytest.raises(StoreError, match=rf"another preprocessing job is writing this store \({holder}\)"):
            hold_lease(root).__enter__()
    assert not root.child(LEASE_FILE).exists()


@pytest.mark.parametrize(
    "change",
    [{"pid": 2**22 - 1}, {"ticks": 1}, {"machine": "an earlier start of it", "pid": 1}],
    ids=["process gone", "another process of that number", "machine restarted"],
)
def test_a_dead_owners_lease_is_taken_over(root: Location, fast: None, change: dict[str, Any]) -> None:
    write_lease(root, **change)
    with hold_lease(root) as held:
        assert read_token(root) == held.owner.token != "left"


def test_a_lease_that_another_machine_renews_is_refused(root: Location, fast: None) -> None:
    owner = write_lease(root, host="far", machine="far")
    over = threading.Event()

    def beat() -> None:
        beats = 0
        while not over.wait(0.02):
            beats += 1
            with root.child(LEASE_FILE).write() as file:
                file.write(json.dumps(asdict(replace(owner, beat=beats))).encode())

    far = threading.Thread(target=beat)
    far.start()
    try:
        with pytest.raises(StoreError, match=r"writing this store \(process \d+ on far\)"):
            hold_lease(root).__enter__()
    finally:
        over.set()
        far.join()


def test_its_owner_renews_it(root: Location, fast: None) -> None:
    with hold_lease(root):
        first = root.child(LEASE_FILE).read_bytes()
        when(lambda: root.child(LEASE_FILE).read_bytes() != first)


def test_an_owner_that_was_taken_over_notices(root: Location, fast: None) -> None:
    with hold_lease(root) as held:
        held.check()
        root.child(LEASE_FILE).delete()
        write_lease(root, host="far", token="another")
        when(lambda: held._stolen_by is not None)
        with pytest.raises(
            StoreError,
            match=r"on far has taken over this store\. Either this process could not renew .* by hand",
        ):
            held.check()
    assert read_token(root) == "another"


def names(root: Location) -> set[str]:
    """What lies in the store's folder; of a bucket what is known to be written."""
    known = [LEASE_FILE, *(f"{lease._CLAIM}{token}" for token in ("left", "claimant"))]
    return {name for name in known if root.child(name).exists()}


def owner_of(**changes: Any) -> Owner:
    return replace(this_process(), **{"token": "left", **changes})


@pytest.fixture
def threads_as_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unfinished files are named after their process; here threads stand for processes."""

    class Os:
        def __getattr__(self, name: str) -> Any:
            return threading.get_ident if name == "getpid" else getattr(os, name)

    monkeypatch.setattr(location, "os", Os())


GONE: dict[str, Any] = {"pid": 2**22 - 1}


def test_one_of_many_takes_a_lease_over(root: Location, fast: None, threads_as_processes: None) -> None:
    """The others are told of the one that holds it, and of nothing else."""
    write_lease(root, **GONE)
    together, ends = threading.Barrier(8), []

    def take() -> None:
        together.wait(60)
        try:
            with hold_lease(root) as held:
                together.wait(60)
                held.check()
                ends.append("held")
        except StoreError as error:
            ends.append(str(error).partition(" (")[0])
            together.wait(60)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == sorted(["held", *[f"{root}: another preprocessing job is writing this store"] * 7])
    assert names(root) == set()


def test_a_lease_that_is_taken_over_meanwhile_is_left_alone(
    root: Location, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at its dead owner and our claim another process may have been quicker."""
    write_lease(root, **GONE)
    is_alive = lease._is_alive

    def too_late(file: Location, holder: Owner) -> bool:
        alive = is_alive(file, holder)
        if holder.token == "left":
            with root.child(LEASE_FILE).write() as stream:
                stream.write(json.dumps(asdict(owner_of(token="quicker"))).encode())
        return alive

    monkeypatch.setattr(lease, "_is_alive", too_late)
    with pytest.raises(StoreError, match="another preprocessing job is writing this store"):
        hold_lease(root).__enter__()
    assert read_token(root) == "quicker"
    assert names(root) == {LEASE_FILE}


def test_a_claimant_that_died_is_no_obstacle(root: Location, fast: None) -> None:
    write_lease(root, **GONE)
    root.child(f"{lease._CLAIM}left").create(json.dumps(asdict(owner_of(token="claimant", **GONE))).encode())
    with hold_lease(root) as held:
        assert read_token(root) == held.owner.token
        assert names(root) == {LEASE_FILE}


def test_a_living_claimant_is_waited_for(root: Location, fast: None, threads_as_processes: None) -> None:
    write_lease(root, **GONE)
    claim = root.child(f"{lease._CLAIM}left")
    claim.create(json.dumps(asdict(owner_of(token="claimant"))).encode())
    over = threading.Event()

    def finish() -> None:
        over.wait(60)
        with root.child(LEASE_FILE).write() as stream:
            stream.write(json.dumps(asdict(owner_of(token="claimant"))).encode())
        claim.delete()

    other = threading.Thread(target=finish)
    other.start()
    threading.Timer(0.2, over.set).start()
    with pytest.raises(StoreError, match="another preprocessing job is writing this store"):
        hold_lease(root).__enter__()
    other.join()
    assert read_token(root) == "claimant"


def test_giving_back_leaves_anothers_lease(root: Location, fast: None) -> None:
    with hold_lease(root) as held:
        held._released.set()
        held._heart.join()
        with root.child(LEASE_FILE).write() as stream:
            stream.write(json.dumps(asdict(owner_of(token="another"))).encode())
    assert read_token(root) == "another"


def test_what_is_no_lease_is_replaced(root: Location, fast: None) -> None:
    root.child(LEASE_FILE).create(b"torn by a crash")
    with hold_lease(root) as held:
        assert read_token(root) == held.owner.token


def test_a_file_system_that_cannot_hold_a_lease_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EINVAL, "not here", str(target))

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr(rename, "rename_new", refuse)
    with pytest.raises(StoreError, match=rf"{tmp_path}.*: this file system has neither hard links nor"):
        hold_lease(Location.parse(tmp_path / "store")).__enter__()
