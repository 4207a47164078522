"""Fixtures shared by all rooms: pools of ranks started once per world size, a bucket, and the reference data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bucket import bucket, s3_server  # noqa: F401 - fixtures, for every room
from reference_folder import pytest_terminal_summary, reference  # noqa: F401 - a fixture, and a hook

from megatron_deepstack.platform.processes.garbage import settle
from megatron_deepstack.testing.ranks import RankPool

CHILD_PROCESSES = str(Path(__file__).parent / "child_processes")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What runs in one process where pytest-xdist has several (`-n 2 --dist loadgroup`).

    All tests of a file do, for the fixtures they share; and all that start Ray do, since several would fight for the
    cores. It comes first, because pytest-xdist reads the groups in the same hook.
    """
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(group_of(item)))


def pytest_configure() -> None:
    """Processes that tests start treat warnings of our code as errors; see child_processes/sitecustomize.py."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if CHILD_PROCESSES not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([CHILD_PROCESSES, *filter(None, paths)])
        sys.path.append(CHILD_PROCESSES)  # which some tests pass on as PYTHONPATH


def group_of(item: pytest.Item) -> str:
    """The name of the group that a test runs in."""
    return "orchestration" if "orchestration" in item.path.parts else item.path.stem


def pytest_collection_finish() -> None:
    """Half a million objects of torch and pytest need not be looked through in every collection of the suite."""
    settle()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(n)`: a pool of n gloo ranks, started at its first use; another after one that failed."""
    pools: dict[int, RankPool] = {}

    def pool(num_ranks: int) -> RankPool:
        if num_ranks not in pools or not pools[num_ranks].alive:
            pools[num_ranks] = RankPool(num_ranks)
        return pools[num_ranks]

    yield pool
    for started in pools.values():
        started.close()


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
