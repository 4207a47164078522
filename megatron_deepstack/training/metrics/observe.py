"""Chosen steps seen closely: Chrome traces of torch.profiler, and timelines of all ranks. Nothing in other steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.parallel.host_clock import Offset, clock_offsets
from megatron_deepstack.platform.compute.device import has_gpu
from megatron_deepstack.platform.files.run_disk import writing
from megatron_deepstack.platform.files.write_whole import write_whole
from megatron_deepstack.step.clock import StepClock
from megatron_deepstack.step.timeline import Interval, Timeline


class Observer:
    """Looks at the steps that `logging.profile_steps` and `logging.timeline_steps` name."""

    def __init__(self, recipe: Recipe, groups: Groups) -> None:
        """Take the run's recipe and its process groups."""
        self.recipe, self.groups = recipe, groups

    @contextmanager
    def step(self, number: int, clock: StepClock) -> Iterator[None]:
        """Observe the step that the block does. Collective over all ranks in steps of `logging.timeline_steps`.

        Args:
            number: The step, 1-based.
            clock: The step's clock, which takes the timeline.

        Yields:
            Nothing.
        """
        logging = self.recipe.logging
        with ExitStack() as looking:
            if number in logging.timeline_steps:
                looking.enter_context(self._timeline(number, clock))
            if number in logging.profile_steps and dist.get_rank() in logging.profile_ranks:
                looking.enter_context(self._profile(number))
            yield

    @contextmanager
    def _profile(self, number: int) -> Iterator[None]:
        folder = RunFolder(self.recipe.run_dir).profile
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_gpu() else [])]
        with profile(activities=activities) as profiler:
            yield
        file = folder / f"rank_{dist.get_rank()}_step_{number}.json"
        with writing(file):
            profiler.export_chrome_trace(str(file))

    @contextmanager
    def _timeline(self, number: int, clock: StepClock) -> Iterator[None]:
        clock.timeline = Timeline()
        try:
            yield
        finally:
            timeline, clock.timeline = clock.timeline, None
        offsets = clock_offsets()
        mine = {"rank": dist.get_rank(), **asdict(self.groups.place), "intervals": timeline.intervals}
        everyone: list[dict[str, Any]] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, everyone)
        if everyone is not None:
            document = timeline_document(self.recipe, number, everyone, offsets)
            file = RunFolder(self.recipe.run_dir).timeline(number)
            with writing(file):
                write_whole(file, json.dumps(document, allow_nan=False))


def timeline_document(recipe: Recipe, step: int, ranks: list[dict[str, Any]], offsets: list[Offset]) -> dict[str, Any]:
    """The timeline of one step of all ranks, as plain JSON values.

    Args:
        recipe: The run's recipe.
        step: The step, 1-based.
        ranks: For each rank its place in the layout and its intervals.
        offsets: For each rank the offset of its clock.

    Returns:
        The document. An interval is [kind, micro-batch, chunk, begin, end], with times in seconds from the beginning of
        the first interval of any rank.
    """
    start = min(
        interval.begin_ns - offset.ns
        for rank, offset in zip(ranks, offsets, strict=True)
        for interval in rank["intervals"]
    )
    return {
        "step": step,
        "encoder_placement": str(recipe.parallel.encoder_placement),
        "clock_error_seconds": max(offset.spread_ns for offset in offsets) / 1e9,
        "ranks": [
            {**rank, "intervals": [_plain(interval, start + offset.ns) for interval in rank["intervals"]]}
            for rank, offset in zip(ranks, offsets, strict=True)
        ],
    }


def _plain(interval: Interval, start_ns: int) -> list[Any]:
    times = [round((ns - start_ns) / 1e9, 7) for ns in (interval.begin_ns, interval.end_ns)]
    return [interval.kind, interval.micro_batch, interval.vpp, *times]
