"""Work in a thread while the main thread follows the run: it keeps `launch.json` current and hears requests to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.errors import PreemptedError
from orchestration.launch.driver.follow import Follower
from orchestration.launch.driver.stopping import wants_it_now

_FOLLOW_SECONDS: Final = 0.5


class BackgroundCheck(threading.Thread):
    """A piece of work and its outcome. It ends with the process, finished or not."""

    def __init__(self, name: str, work: Callable[[], Any]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self.result: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        """What the thread does."""
        try:
            self.result = self._work()
        except Exception as error:
            self.error = error

    def outcome(self) -> Any:
        """The work's result, once it has ended; raises what it raised."""
        if self.error is not None:
            raise self.error
        return self.result


def follow(background: BackgroundCheck, follower: Follower, run_dir: Path, second: threading.Event) -> None:
    """Start work and wait for its end, following the run meanwhile.

    Args:
        background: The work; it is started here.
        follower: Told to look twice a second.
        run_dir: The run's folder, where a request to end at once may appear.
        second: Set once the driver was asked to stop for the second time.

    Raises:
        PreemptedError: The run is to end at once.
    """
    background.start()
    while background.is_alive():
        background.join(_FOLLOW_SECONDS)
        follower.look()
        if second.is_set() or wants_it_now(run_dir):
            raise PreemptedError("ended at once on request; the same command goes on from the newest checkpoint")
    follower.look()
