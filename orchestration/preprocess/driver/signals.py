"""SIGTERM and SIGINT as an error that unwinds the driver, so that Ray is shut down and the lease given back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

from megatron_deepstack.errors import PreemptedError

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """In this block the first SIGTERM or SIGINT raises PreemptedError; later ones do not interrupt the clean-up.

    Threads other than the main one cannot handle signals: there nothing changes.

    Raises:
        PreemptedError: A signal came, also where it came within a call into Ray's core, which reports an exception of a
            handler as a SystemError caused by it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _stop) for number in _SIGNALS}
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__, PreemptedError):
            raise error.__cause__ from None
        raise
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _stop:
                signal.signal(number, handler)


def _stop(number: int, frame: Any) -> NoReturn:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    name = signal.Signals(number).name
    raise PreemptedError(f"preprocess: stopped by {name}. What is done is kept; the same command goes on from there.")
