"""One tiny run for all tests of answers."""

from __future__ import annotations

import pytest
from tiny_run import make_run

from megatron_deepstack.config.schema import Recipe


@pytest.fixture(scope="package")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_run(tmp_path_factory.mktemp("answers"))
