"""How the suite is shared out among several processes."""

from __future__ import annotations

import pytest


def test_a_file_runs_in_one_process(request: pytest.FixtureRequest) -> None:
    """pytest-xdist keeps together what has the same end; without it, files share fixtures with nobody."""
    if request.config.getoption("dist", "no") != "loadgroup":
        pytest.skip("the suite runs in one process")
    assert request.node.nodeid.endswith("@test_groups")
