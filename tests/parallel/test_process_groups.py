"""Process groups have one deadline, whoever makes them, and no second backend beside the device's."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.testing.ranks import RankPool

Pools = Callable[[int], RankPool]


def new_groups(rank: int, seconds: float) -> list[dict[str, Any]]:
    """Keywords of every call that makes a group."""
    import torch.distributed as dist

    from megatron_deepstack.parallel.groups import create_groups
    from megatron_deepstack.testing import ranks as worker

    parallel = ParallelConfig(pipeline=2)
    worker.groups_for(parallel)
    real, calls = dist.new_group, []

    def note(*ranks: object, **keywords: Any) -> object:
        calls.append(keywords)
        return real(*ranks, **keywords)

    dist.new_group = note  # type: ignore[assignment]
    try:
        create_groups(parallel, 0, seconds)
    finally:
        dist.new_group = real
        worker._worlds.pop("layout")  # the next test makes its own
    return [{"timeout": call.get("timeout"), "backend": call.get("backend")} for call in calls]


def test_every_group_waits_as_long_as_it_is_told(ranks: Pools) -> None:
    """A group left with the library's own deadline ends a run before the watchdog has named who is silent."""
    for calls in ranks(2).run(new_groups, 123.0):
        assert len(calls) > 8
        assert {call["timeout"] for call in calls} == {timedelta(seconds=123)}
        assert {call["backend"] for call in calls} == {None}
