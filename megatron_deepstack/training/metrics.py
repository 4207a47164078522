"""Records of a run: JSON lines, TensorBoard and one console line a step, written by rank 0."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step's metrics."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean loss per target over the global batch."""
    gradient_norm: float
    lr: float
    num_targets: int
    num_tokens: int
    """Tokens of the global batch, visual ones included, padding not."""
    num_images: int
    step_seconds: float
    tokens_per_second: float
    images_per_second: float
    memory_bytes: int
    """Most device memory allocated on rank 0 so far; 0 on a CPU."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time by part of the step on rank 0."""
    applied: bool = True
    """The optimizer step was carried out (gradients were finite)."""
    resumed: bool = False
    """First step after a resumption."""
    validation_loss: float | None = None
    """Mean loss per target on held-out samples, where it was measured after this step."""
    skipped_steps: int = 0
    """Steps left out one after another up to this one; 0 where this one was applied."""
    spike: bool = False
    """The loss stands out of the steps before it (`health.spike_factor`)."""
    samples: tuple[str, ...] = ()
    """Ids of the step's samples, where it was left out or its loss stands out."""
    unreadable: int = 0
    """Samples of this step that could not be read and are left out of its loss."""
    unreadable_samples: tuple[str, ...] = ()
    """Their ids."""
    slow_ranks: tuple[int, ...] = ()
    """Ranks found slow at this step (`health.straggler_factor`)."""
    stall_seconds: float = 0.0
    """Time in which training stood still for a checkpoint since the record before."""
    lr_by_part: Mapping[str, float] = field(default_factory=dict)
    """Learning rate of each part that learns."""
    tokens_per_second_per_rank: float = 0.0
    tflops_per_second: float = 0.0
    """Model TFLOP/s of the whole run, as `planning.cost` counts them."""
    tflops_per_second_per_rank: float = 0.0
    mfu: float | None = None
    """Model FLOP/s over the devices' peak; None where the peak is not known."""


class MetricsLog:
    """Where records go. On ranks other than 0 nothing is opened and records vanish. A context manager."""

    def __init__(self, run_dir: Path, *, first_step: int, num_steps: int, interval: int, writes: bool) -> None:
        """Lines of steps after `first_step`, left by a run that went further than its checkpoint, are dropped."""
        self.num_steps, self.interval, self.writes = num_steps, interval, writes
        self._begin, self._first_step = time.monotonic(), first_step
        if not writes:
            return
        self.file = run_dir / "metrics.jsonl"
        _drop_after(self.file, first_step)
        self._lines = self.file.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writes:
            self._lines.close()
            self._board.close()

    def say(self, text: str) -> None:
        """A line on the console of rank 0."""
        if self.writes:
            self._console.print(text, markup=False)

    def add(self, record: StepRecord) -> None:
        """Write one step."""
        if not self.writes:
            return
        self._lines.write(json.dumps(asdict(record)) + "\n")
        self._lines.flush()
        for name in ("loss", "gradient_norm", "lr", "tokens_per_second", "images_per_second", "step_seconds"):
            self._board.add_scalar(name, getattr(record, name), record.step)
        if record.validation_loss is not None:
            self._board.add_scalar("validation_loss", record.validation_loss, record.step)
        for part, seconds in record.seconds.items():
            self._board.add_scalar(f"seconds/{part}", seconds, record.step)
        first = record.step == self._first_step + 1
        due = record.step % self.interval == 0 or record.step == self.num_steps
        if first or due or record.validation_loss is not None:
            self.say(self._line(record))

    def _line(self, record: StepRecord) -> str:
        width = len(str(self.num_steps))
        done = record.step - self._first_step
        left = (time.monotonic() - self._begin) / done * (self.num_steps - record.step)
        waited = record.seconds.get("data", 0.0) / max(record.step_seconds, 1e-9)
        validation = "" if record.validation_loss is None else f"  validation loss {record.validation_loss:.4f}"
        skipped = "" if record.applied else "  SKIPPED: gradient not finite"
        return (
            f"step {record.step:>{width}}/{self.num_steps}  loss {record.loss:.4f}  lr {record.lr:.2e}  grad "
            f"{record.gradient_norm:.2f}  {record.tokens_per_second:,.0f} tokens/s  data {waited:.0%}  left "
            f"{int(left) // 60}:{int(left) % 60:02d}{validation}{skipped}"
        )


def _drop_after(file: Path, last_step: int) -> None:
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # a line cut short by a kill; the step it belongs to is run again
    file.write_text("".join(kept), encoding="utf-8")
