"""Records of a run, written by rank 0: console, JSON lines, TensorBoard, and Weights & Biases where it is wanted."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import RunFolderError
from megatron_deepstack.platform.files.run_disk import writing
from megatron_deepstack.platform.files.strict_json import to_line
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
        """Open the outputs. Records of steps after `first_step`, left by an earlier attempt, are dropped.

        Args:
            recipe: The run's recipe.
            first_step: Steps done before this run.
            writes: Whether this rank writes; true on rank 0 only.

        Raises:
            ConfigError: Weights & Biases is wanted and cannot be reached.
            RunFolderError: The run folder cannot be written.
        """
        self.console: StepConsole | None = None
        self.run_dir = Path(recipe.run_dir)
        self.sinks: list[Sink] = []
        if not writes:
            return
        folder = RunFolder(recipe.run_dir)
        with writing(self.run_dir):
            self.sinks += [JsonLines(folder.metrics, first_step)]
            self.sinks += [Board(folder.tensorboard, first_step)]
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
        """Close what is open. If the run ends with an error, that error is shown, not a later one from here."""
        if self.console is not None:
            self.console.close()
        for sink in self.sinks:
            try:
                with writing(self.run_dir):
                    sink.close()
            except RunFolderError:
                if error is None:
                    raise

    def say(self, text: str) -> None:
        """A line on the console of rank 0."""
        if self.console is not None:
            self.console.say(text)

    def add(self, record: StepRecord) -> None:
        """Write one step. Raises RunFolderError where the disk refuses."""
        with writing(self.run_dir):
            for sink in self.sinks:
                sink.add(record)
        if self.console is not None:
            self.console.add(record)


class JsonLines:
    """One JSON object a step, on disk as soon as the step is done."""

    def __init__(self, file: Path, first_step: int) -> None:
        """Open the file to append. Records of steps after `first_step` are dropped from it."""
        _drop_after(file, first_step)
        self._file = file.open("a", encoding="utf-8")

    def add(self, record: StepRecord) -> None:
        """Write one step."""
        self._file.write(to_line(asdict(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Board:
    """TensorBoard."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open the folder. What earlier runs wrote of steps after `first_step` is hidden; with 0, all of it."""
        self._hook = threading.excepthook
        threading.excepthook = self._of_thread
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def _of_thread(self, args: threading.ExceptHookArgs) -> None:
        """TensorBoard's own thread keeps an error of the disk, and the next call raises it: no traceback here."""
        if type(args.thread).__module__ != EventFileWriter.__module__:
            self._hook(args)

    def add(self, record: StepRecord) -> None:
        """Write one step."""
        for name, value in record.scalars:
            if name != "step":
                self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Write what is still held back."""
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook


def _drop_after(file: Path, last_step: int) -> None:
    """Keep the records of steps up to `last_step`; they stay on the disk until the new file is there, whole."""
    if not file.exists():
        return
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        out.writelines(to_line(record) + "\n" for record in earlier_records(file, last_step))
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)
