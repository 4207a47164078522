"""A signal that comes while the driver is inside Ray."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_deepstack.errors import PreemptedError
from orchestration.preprocess.driver.signals import stop_on_signals


def _as_cython_reports_it() -> None:
    """Ray's core returns with an exception of the handler set, of which Python makes a SystemError."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 0)  # gives the handler its turn
    except PreemptedError as error:
        raise SystemError("returned a result with an exception set") from error


def test_a_signal_within_a_call_of_ray_is_told_as_any_other() -> None:
    with pytest.raises(PreemptedError, match="stopped by SIGINT"), stop_on_signals():
        _as_cython_reports_it()


def test_other_errors_of_calls_stay_what_they_are() -> None:
    with pytest.raises(SystemError, match="another"), stop_on_signals():
        raise SystemError("another")
