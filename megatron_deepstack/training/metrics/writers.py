"""Records of a run, written by rank 0: console, JSON lines, TensorBoard, and Weights & Biases where it is wanted."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.training.guard.health import earlier_records
from megatron_deepstack.training.metrics.console import StepConsole
from megatron_deepstack.training.metrics.record import StepRecord
from megatron_deepstack.training.metrics.wandb_run import WandbRun


class Sink(Protocol):
    """A place where records go."""

    def add(self, record: StepRecord) -> None:
        """Write one step."""

    def close(self) -> None:
        """Write what is still held back."""


class MetricsLog:
    """Where records go. On ranks other than 0 nothing is opened and records vanish. A context manager."""

    def __init__(self, recipe: Recipe, *, first_step: int, writes: bool) -> None:
        """What a run that went further than its checkpoint left of steps after `first_step` is dropped.

        Raises ConfigError where Weights & Biases is wanted and cannot be reached.
        """
        self.console: StepConsole | None = None
        self.sinks: list[Sink] = []
        if not writes:
            return
        folder = RunFolder(recipe.run_dir)
        self.sinks += [JsonLines(folder.metrics, first_step), Board(folder.tensorboard, first_step)]
        if recipe.logging.wandb_project is not None:
            self.sinks.append(WandbRun(recipe))
        self.console = StepConsole(
            Console(file=sys.stdout, highlight=False, soft_wrap=True),
            first_step=first_step,
            num_steps=recipe.train.steps,
            interval=recipe.train.log_interval,
        )

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console is not None:
            self.console.close()
        for sink in self.sinks:
            sink.close()

    def say(self, text: str) -> None:
        """A line on the console of rank 0."""
        if self.console is not None:
            self.console.say(text)

    def add(self, record: StepRecord) -> None:
        """Write one step."""
        for sink in self.sinks:
            sink.add(record)
        if self.console is not None:
            self.console.add(record)


class JsonLines:
    """One JSON object a step, on disk as soon as the step is done."""

    def __init__(self, file: Path, first_step: int) -> None:
        _drop_after(file, first_step)
        self._file = file.open("a", encoding="utf-8")

    def add(self, record: StepRecord) -> None:
        """Write one step."""
        self._file.write(json.dumps(asdict(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Board:
    """TensorBoard."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Hides what runs before this one wrote of steps after `first_step`, all of it where the run begins anew."""
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def add(self, record: StepRecord) -> None:
        """Write one step."""
        for name, value in record.scalars:
            if name != "step":
                self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Write what is still held back."""
        self._writer.close()


def _drop_after(file: Path, last_step: int) -> None:
    """Keep the records of steps up to `last_step`; they stay on the disk until the new file is there, whole."""
    if not file.exists():
        return
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(record) + "\n" for record in earlier_records(file, last_step))
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)
