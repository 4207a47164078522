"""Writer processes of checkpoints that are used again by the next saver of the same rank.

A saver starts its writer, and ends it. In a job of days that costs nothing. A rank of a pool has a new saver for every
tiny run, and each start imports torch, which takes longer than the run itself. So a saver that ends leaves its writer
to the next one, unless a save was lost or failed. Tests of the writer itself do without this, by `own_writers`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_deepstack.checkpoint.saving import saver
from megatron_deepstack.checkpoint.saving.background import Background, Work
from megatron_deepstack.checkpoint.saving.plan import RankPlan

_idle: list[Background] = []


class LentWriter:
    """What a saver takes for its own `Background`."""

    def __init__(self) -> None:
        self._writer = _idle.pop() if _idle else Background()
        self._work: Work | None = None

    @property
    def staged(self) -> threading.Event:
        """As `Background.staged`."""
        return self._writer.staged

    def write(self, plan: RankPlan, folder: Path, rank: int, before: Callable[[], None]) -> Work:
        """As `Background.write`.

        Args:
            plan: The files of this rank.
            folder: The checkpoint's partial folder.
            rank: The global rank.
            before: Called before the first byte is written.

        Returns:
            The work.
        """
        self._work = self._writer.write(plan, folder, rank, before)
        return self._work

    def close(self) -> None:
        """Leave the writer to the next saver; end it if it may still be writing, or if its save failed."""
        if self._work is None or (self._work.done.is_set() and self._work.error is None):
            _idle.append(self._writer)
        else:
            self._writer.close()


def lend_writers() -> None:
    """Have all savers of this process share writers from now on."""
    module: Any = saver
    module.Background = LentWriter


@contextmanager
def own_writers() -> Iterator[None]:
    """Within it, a saver starts a writer of its own and ends it, as in every run outside a pool."""
    module: Any = saver
    before, module.Background = module.Background, Background
    try:
        yield
    finally:
        module.Background = before
