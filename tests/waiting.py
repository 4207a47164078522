"""The one place in which tests wait: for a condition, with a deadline, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(
    came: Callable[[], object], what: Callable[[], object] | str = "condition", seconds: float = 200
) -> None:
    """Look until `came()` is true.

    Args:
        came: What is waited for.
        what: Said when it does not come; a function is called only then.
        seconds: The deadline. It is no measure of anything, so it leaves room for a busy machine.

    Raises:
        AssertionError: It did not come in time.
    """
    deadline = time.monotonic() + seconds
    while not came():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what() if callable(what) else what}"
        time.sleep(0.01)
