"""transformers without its chatter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers.utils import logging


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """It talks about every file it writes and every key it renames."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()
