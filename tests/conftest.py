"""Fixtures shared by all rooms: pools of ranks started once per world size, a bucket, and the reference data."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bucket import bucket, s3_server  # noqa: F401 - fixtures, for every room
from hypothesis import settings
from reference_folder import pytest_terminal_summary, reference  # noqa: F401 - a fixture, and a hook

from megatron_deepstack.errors import RankError
from megatron_deepstack.platform.processes.garbage import settle
from megatron_deepstack.testing.ranks import RankPool

CHILD_PROCESSES = str(Path(__file__).parent / "child_processes")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What runs in one process where pytest-xdist has several: groups of tests (`group_of`).

    Groups by marks (`--dist loadgroup`) do not do it: pytest-xdist 3.8 writes them where pytest 9.2 no longer looks.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


def pytest_configure() -> None:
    """Processes that tests start treat warnings of our code as errors; see child_processes/sitecustomize.py.

    hypothesis' deadline of 200 ms for one example would be a timed assertion.
    """
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if CHILD_PROCESSES not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([CHILD_PROCESSES, *filter(None, paths)])
        sys.path.append(CHILD_PROCESSES)  # which some tests pass on as PYTHONPATH


def group_of(nodeid: str) -> str:
    """The name of the group that a test runs in.

    All tests of a file are one, for the fixtures they share; and so are all that start Ray, since several would fight
    for the cores.
    """
    file = nodeid.partition("::")[0]
    return "orchestration" if "orchestration" in file.split("/") else file


@pytest.fixture(scope="module", autouse=True)
def _one_process(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two processes that share out a file's tests would make all its fixtures twice, and say nothing."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        folder = tmp_path_factory.getbasetemp().parent / "groups"
        folder.mkdir(exist_ok=True)
        group = group_of(request.node.nodeid)
        with open(folder / group.replace("/", "."), "a+", encoding="utf-8") as file:
            file.write(f"{worker}\n")
            file.seek(0)
            assert set(file.read().split()) == {worker}, f"{group} runs in several processes"


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """What ends on a signal ignores further ones until its process is gone, and a test's process goes on.

    Processes that later tests start would inherit the ignored signals, and not end when they are asked to.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_finish() -> None:
    """Half a million objects of torch and pytest need not be looked through in every collection of the suite."""
    settle()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(n)`: a pool of n gloo ranks, started at its first use; another after one that failed."""
    pools: dict[int, RankPool] = {}

    def pool(num_ranks: int) -> RankPool:
        if num_ranks not in pools or not pools[num_ranks].alive:
            pools[num_ranks] = _joined(num_ranks)
        return pools[num_ranks]

    yield pool
    for started in pools.values():
        started.close()


def _joined(num_ranks: int) -> RankPool:
    """A pool whose ranks have found each other.

    It is tried twice: under a load of 30 and more, gloo's first connections sometimes break.
    """
    pool = RankPool(num_ranks)
    try:
        pool.run(int)  # of its rank, which is nearly nothing
    except RankError:
        pool = RankPool(num_ranks)
    return pool


@pytest.fixture
def quiet_transformers() -> Iterator[None]:
    """transformers without its chatter about every file it writes and every key it renames."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()
