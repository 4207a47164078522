"""Timing work on the device, and a tiny world of one rank to do it in."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.platform.compute.device import select_device
from megatron_deepstack.platform.compute.stopwatch import Stopwatch
from megatron_deepstack.testing.gpu.report import Settings
from megatron_deepstack.testing.ranks import be_the_only_rank, groups_for

Action = Callable[[], object]


def mean_seconds(action: Action, repeats: int, warm_up: int = 1) -> float:
    """Time an action on the device.

    Args:
        action: What is timed.
        repeats: Calls under the clock, one after another without a wait between them.
        warm_up: Calls before.

    Returns:
        Mean seconds of a call.
    """
    for _ in range(warm_up):
        action()
    watch = Stopwatch()
    watch.start()
    for _ in range(repeats):
        action()
    watch.stop()
    return watch.take() / repeats


def enter_world(settings: Settings) -> None:
    """Make this process the only rank of a world. Call once, before anything of Megatron-Core is built."""
    be_the_only_rank(Path(tempfile.mkdtemp(dir=settings.work)))


def only_rank(settings: Settings) -> Groups:
    """The groups of a world of this process alone, joined. Call once per process."""
    enter_world(settings)
    select_device()
    groups: Groups = groups_for(ParallelConfig())
    return groups


def write_ceiling(settings: Settings, tflops: float) -> None:
    """Keep what matrix products reach, for the parts that come later.

    Args:
        settings: Folders of the trial.
        tflops: TFLOP/s in bf16.
    """
    settings.ceiling.write_text(json.dumps(tflops))


def read_ceiling(settings: Settings) -> float | None:
    """TFLOP/s that matrix products reach; None where it was not measured."""
    if not settings.ceiling.exists():
        return None
    return float(json.loads(settings.ceiling.read_text()))
