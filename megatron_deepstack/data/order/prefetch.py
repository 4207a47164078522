"""Steps prepared ahead in a thread: while one is trained, the next is planned and read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

StepT = TypeVar("StepT", covariant=True)


class Loads(Protocol[StepT]):
    """Anything that gives a step by its number."""

    def load(self, step: int) -> StepT:
        """Load the 0-based step."""


class Prefetcher(Generic[StepT]):
    """Iterates over steps `first` to `stop - 1`; each is prepared in a thread while the one before is trained.

    An error in the thread is raised, with a note, when its step is asked for. The thread ends with the iteration.
    """

    def __init__(self, reader: Loads[StepT], first: int, stop: int) -> None:
        self.reader, self.first, self.stop = reader, first, stop

    def __iter__(self) -> Iterator[StepT]:
        if self.first >= self.stop:
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
            upcoming: Future[StepT] = pool.submit(self.reader.load, self.first)
            for step in range(self.first, self.stop):
                try:
                    ready = upcoming.result()
                except Exception as error:
                    error.add_note(f"while the data of step {step + 1} was prepared")
                    raise
                if step + 1 < self.stop:
                    upcoming = pool.submit(self.reader.load, step + 1)
                yield ready
