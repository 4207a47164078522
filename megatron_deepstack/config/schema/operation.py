"""How a run is kept and watched: checkpoints, health, logging, and the job on a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_deepstack.config.choices import SaveMode
from megatron_deepstack.config.constraints import NOT_NEGATIVE, POSITIVE, PathKind, Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written, and which stay."""

    interval: Annotated[int, NOT_NEGATIVE, Unit("steps")] = 500
    """Steps between checkpoints; the last step is always saved. 0 saves only the last."""
    keep: Annotated[int, NOT_NEGATIVE, Unit("checkpoints")] = 2
    """Newest checkpoints that are kept; 0 keeps all. With two, a damaged newest one still leaves its predecessor."""
    keep_every: Annotated[int, NOT_NEGATIVE, Unit("steps")] = 0
    """Checkpoints whose step is a multiple of this are kept for good, besides the newest; 0 for none."""
    mode: SaveMode = SaveMode.ASYNC
    """`async` copies the state and trains on while the files are written; `sync` waits for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthConfig:
    """When a run is in trouble, and what is done about it."""

    max_skipped_steps: Annotated[int, NOT_NEGATIVE, Unit("steps")] = 10
    """Steps with a loss or gradient that is not finite, or without any target, are skipped; the run stops at more than
    this many in a row."""
    spike_factor: Annotated[float, NOT_NEGATIVE] = 2.0
    """A loss above this many times the median of the last `spike_window` steps, and above it by more than 0.1, is
    reported with its samples. 0 reports none."""
    spike_window: Annotated[int, POSITIVE, Unit("steps")] = 100
    """Steps that the median of losses is taken over; nothing is reported before half of them are done."""
    max_unreadable_samples: Annotated[int, NOT_NEGATIVE, Unit("samples")] = 100
    """Samples that may be left out under `data.unreadable: skip` before the run stops."""
    straggler_factor: Annotated[float, NOT_NEGATIVE] = 1.5
    """A rank whose own work took this many times as long as the median rank's over `straggler_window` steps is named. 0
    names none."""
    straggler_window: Annotated[int, NOT_NEGATIVE, Unit("steps")] = 20
    """Steps between comparisons of the ranks' times; 0 compares never."""
    hang_seconds: Annotated[float, NOT_NEGATIVE, Unit("seconds")] = 600.0
    """A step that takes longer counts as a hang: every rank prints its stacks, silent ranks are named, and the run
    ends. 0 waits without end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """Where metrics go besides console, JSON lines and TensorBoard, and what is measured for them."""

    wandb_project: str | None = None
    """Weights & Biases project that metrics are sent to; needs the extra `wandb`. null sends nothing."""
    peak_tflops: Annotated[float, POSITIVE, Unit("TFLOP/s")] | None = None
    """Peak dense rate of one device, from which the share in use (MFU) follows. If null, the known rate of common GPUs,
    and none on a CPU."""
    profile_steps: tuple[Annotated[int, POSITIVE], ...] = ()
    """Steps, counted from 1, that torch.profiler records on `profile_ranks`, as Chrome traces in RUN/profile."""
    profile_ranks: tuple[Annotated[int, NOT_NEGATIVE], ...] = (0,)
    """Ranks that are profiled."""
    timeline_steps: tuple[Annotated[int, POSITIVE], ...] = ()
    """Steps, counted from 1, whose pipeline timeline (which rank did what when) is recorded for the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """How `launch` runs the job on a Ray cluster."""

    ranks: Annotated[int, POSITIVE, Unit("ranks")] | None = None
    """Worker processes, one per GPU, or per CPU slot where no node has a GPU. If null, one replica of the model."""
    cpus_per_rank: Annotated[int, POSITIVE, Unit("CPUs")] = 1
    """CPUs that Ray sets aside for each rank."""
    max_failures: Annotated[int, NOT_NEGATIVE, Unit("restarts")] = 3
    """How often all ranks are started again after a worker or node died."""
    start_seconds: Annotated[float, POSITIVE, Unit("seconds")] = 600.0
    """Longest wait until the cluster has room for the ranks."""
    storage: Annotated[str, PathKind.LOCAL] | None = None
    """Folder shared by all nodes, for Ray Train's own records; RUN/ray if null."""
