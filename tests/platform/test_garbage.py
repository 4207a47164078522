"""What is alive when a process settles is looked at by no later collection."""

from __future__ import annotations

import gc

from megatron_deepstack.platform.processes.garbage import settle


def test_settled_objects_are_left_out() -> None:
    kept = [[number] for number in range(1000)]
    try:
        settle()
        assert gc.get_freeze_count() >= len(kept)
        assert len(gc.get_objects()) < 1000
    finally:
        gc.unfreeze()
