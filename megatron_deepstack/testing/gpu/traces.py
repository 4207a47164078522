"""Chrome traces of torch.profiler, read back: the largest kernels, how long the GPU was idle, what the host called."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch.profiler import ProfilerActivity, profile

from megatron_deepstack.platform.compute.device import has_gpu, synchronize

Event = Mapping[str, Any]

_ON_DEVICE: Final = ("kernel", "gpu_memcpy", "gpu_memset")
_RUNTIME: Final = ("cuda_runtime", "cuda_driver")
_HOST: Final = ("cpu_op",)


@dataclass(frozen=True, slots=True)
class Kernel:
    """All calls of one kernel."""

    name: str
    calls: int
    microseconds: float


def record(action: Callable[[], object], file: Path) -> list[Event]:
    """Run `action` under the profiler and write its trace.

    Args:
        action: What to watch; run it before, so that nothing happens for the first time.
        file: The trace, JSON, compressed if it ends in `.gz`.

    Returns:
        The trace's events with a duration; times in microseconds.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_gpu() else [])]
    with profile(activities=activities) as profiler:
        action()
        synchronize()
    profiler.export_chrome_trace(str(file))
    return read_events(file)


def read_events(file: Path) -> list[Event]:
    """Events of a trace that have a duration."""
    if file.suffix == ".gz":
        import gzip

        text = gzip.decompress(file.read_bytes()).decode()
    else:
        text = file.read_text(encoding="utf-8")
    return [event for event in json.loads(text)["traceEvents"] if event.get("ph") == "X"]


def largest_kernels(events: Sequence[Event], number: int) -> list[Kernel]:
    """The kernels that took most time in all.

    Args:
        events: Events of a trace.
        number: The most that are wanted.

    Returns:
        The largest first; a CPU's operations where no kernel ran.
    """
    found = _of(events, _ON_DEVICE) or _of(events, _HOST)
    seconds: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for event in found:
        seconds[event["name"]] += event["dur"]
        calls[event["name"]] += 1
    names = sorted(seconds, key=lambda name: -seconds[name])[:number]
    return [Kernel(name, calls[name], seconds[name]) for name in names]


def largest_kernel(action: Callable[[], object], folder: Path) -> str:
    """The kernel in which an action spends most time.

    Args:
        action: Run once under the profiler.
        folder: Where the trace is put for a moment.

    Returns:
        The beginning of its name.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        kernels = largest_kernels(record(action, Path(scratch) / "trace.json"), 1)
    return kernels[0].name[:80] if kernels else "nothing recorded"


def idle_share(events: Sequence[Event]) -> float | None:
    """Share of the time from the first kernel to the end of the last in which no kernel ran; None without kernels."""
    intervals = sorted((event["ts"], event["ts"] + event["dur"]) for event in _of(events, _ON_DEVICE))
    if not intervals:
        return None
    first, reached = intervals[0]
    busy = reached - first
    for begin, end in intervals[1:]:
        if end > reached:
            busy += end - max(begin, reached)
            reached = end
    return 1 - busy / (reached - first) if reached > first else 0.0


def runtime_calls(events: Sequence[Event]) -> Counter[str]:
    """Calls of CUDA's runtime by name: launches, copies, waits."""
    return Counter(event["name"] for event in _of(events, _RUNTIME))


def _of(events: Sequence[Event], categories: tuple[str, ...]) -> list[Event]:
    return [event for event in events if event.get("cat") in categories]
