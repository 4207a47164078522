"""A signal leaves a note and nothing else; afterwards signals mean what they did."""

from __future__ import annotations

import signal
import threading

import pytest

from megatron_deepstack.training.guard.preemption import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as request:
        assert not request.asked
        signal.raise_signal(number)
        assert request.asked
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_launcher_may_ask_by_other_means() -> None:
    answers = iter([False, True])
    with StopRequest(lambda: next(answers)) as request:
        assert not request.asked
        assert request.asked


def test_in_a_thread_signals_are_left_alone() -> None:
    """As under Ray Train, whose worker function runs in a thread."""
    found = []

    def ask() -> None:
        with StopRequest(lambda: True) as request:
            found.append((signal.getsignal(signal.SIGTERM), request.asked))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [(before, True)]
