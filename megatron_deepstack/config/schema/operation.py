"""The sections about operating a run: checkpoints, health, logging, and the job on a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_deepstack.config.choices import SaveMode
from megatron_deepstack.config.constraints import NOT_NEGATIVE, POSITIVE, PathKind, Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written, and which of them are kept."""

    interval: Annotated[int, NOT_NEGATIVE, Unit("steps")] = 500
    """Steps between checkpoints; the last step is always saved. 0 saves only the last."""
    keep: Annotated[int, NOT_NEGATIVE, Unit("checkpoints")] = 2
    """Number of newest checkpoints that are kept; 0 keeps all. With two, the run can continue from the older one if the
    newest is damaged."""
    keep_every: Annotated[int, NOT_NEGATIVE, Unit("steps")] = 0
    """Checkpoints whose step is a multiple of this number are never removed; 0 for none."""
    mode: SaveMode = SaveMode.ASYNC
    """`async` copies the state and continues to train while the files are written; `sync` waits for the files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthConfig:
    """What counts as a problem of a run, and what is done about it."""

    max_skipped_steps: Annotated[int, NOT_NEGATIVE, Unit("steps")] = 10
    """A step with a loss or gradient that is not finite, or without any target, is skipped. The run stops after more
    than this many skipped steps in a row."""
    spike_factor: Annotated[float, NOT_NEGATIVE] = 2.0
    """A loss is reported with its samples if it exceeds the median of the last `spike_window` steps by this factor and
    by more than 0.1. 0 reports none."""
    spike_window: Annotated[int, POSITIVE, Unit("steps")] = 100
    """Number of steps over which the median of losses is taken; nothing is reported before half of them are done."""
    max_unreadable_samples: Annotated[int, NOT_NEGATIVE, Unit("samples")] = 100
    """Number of samples that may be left out under `data.unreadable: skip` before the run stops."""
    straggler_factor: Annotated[float, NOT_NEGATIVE] = 1.5
    """A rank is reported if its own work over `straggler_window` steps took this many times as long as that of the
    median rank. 0 reports none."""
    straggler_window: Annotated[int, NOT_NEGATIVE, Unit("steps")] = 20
    """Steps between comparisons of the ranks' times; with 0 they are never compared."""
    hang_seconds: Annotated[float, NOT_NEGATIVE, Unit("seconds")] = 600.0
    """A step that takes longer counts as a hang: every rank writes its Python stacks, ranks that do not respond are
    named, and the run ends. With 0 a hang is never detected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """What is measured and recorded, and where metrics are sent besides the console, JSON lines and TensorBoard."""

    wandb_project: str | None = None
    """Weights & Biases project to which metrics are sent; it needs the extra `wandb`. If null, nothing is sent."""
    peak_tflops: Annotated[float, POSITIVE, Unit("TFLOP/s")] | None = None
    """Peak dense rate of one device, from which its utilisation (MFU) is computed. If null, the known rate of common
    GPUs is used; on a CPU there is then no MFU."""
    profile_steps: tuple[Annotated[int, POSITIVE], ...] = ()
    """Steps, counted from 1, that torch.profiler records on `profile_ranks`, as Chrome traces in RUN/profile."""
    profile_ranks: tuple[Annotated[int, NOT_NEGATIVE], ...] = (0,)
    """Ranks that are profiled."""
    timeline_steps: tuple[Annotated[int, POSITIVE], ...] = ()
    """Steps, counted from 1, whose pipeline timeline is recorded for the report: what each rank did at which time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """How `launch` runs the job on a Ray cluster."""

    ranks: Annotated[int, POSITIVE, Unit("ranks")] | None = None
    """Number of worker processes: one for each GPU, or for each CPU slot where no node has a GPU. If null, as many as
    one replica of the model takes."""
    cpus_per_rank: Annotated[int, POSITIVE, Unit("CPUs")] = 1
    """CPUs that Ray reserves for each rank."""
    max_failures: Annotated[int, NOT_NEGATIVE, Unit("restarts")] = 3
    """Largest number of times that all ranks are started again after a worker or a node died."""
    start_seconds: Annotated[float, POSITIVE, Unit("seconds")] = 600.0
    """Longest wait until the cluster has room for the ranks."""
    storage: Annotated[str, PathKind.LOCAL] | None = None
    """Folder for the records of Ray Train, shared by all nodes; RUN/ray if null."""
