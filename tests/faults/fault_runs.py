"""Runs that faults are made in: a tiny model on a tiny store, started by the command line as a user would."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import DataConfig, ParallelConfig, Recipe
from megatron_deepstack.platform.files.strict_json import from_line
from megatron_deepstack.testing.tiny import tiny_recipe
from megatron_deepstack.testing.tiny_store import write_tiny_store
from megatron_deepstack.training.guard.heartbeat import read_beats

DEADLINE_SECONDS = 240.0
"""For anything that a run should come to; passing it is a failure, never a measurement."""


def fault_recipe(folder: Path, *, steps: int, interval: int, parallel: ParallelConfig | None = None) -> Recipe:
    """A recipe of two stages on a store in `folder`, which is written if it is not there."""
    store = folder / "store.zarr"
    if not store.exists():
        write_tiny_store(store)
    recipe = tiny_recipe(parallel=parallel or ParallelConfig(pipeline=2))
    return replace(
        recipe,
        run_dir=str(folder / "undisturbed"),
        data=DataConfig(store=str(store)),
        train=replace(recipe.train, steps=steps),
        checkpoint=replace(recipe.checkpoint, interval=interval),
    )


def train_on_rank(rank: int, recipe: Recipe, stop_after: int | None = None) -> None:
    """Train on a rank of a pool."""
    from megatron_deepstack.testing.ranks import groups_for
    from megatron_deepstack.training.loop import run

    run(recipe, groups_for(recipe.parallel), stop_after)


def records_of(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of a run so far; a line that is being written is left out."""
    file = Path(run_dir) / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [from_line(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def course_of(run_dir: str | Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every step, to the last bit."""
    return [(record["step"], record["loss"], record["gradient_norm"]) for record in records_of(run_dir)]


def last_step(run_dir: str | Path) -> int:
    """Steps done so far."""
    records = records_of(run_dir)
    return int(records[-1]["step"]) if records else 0


class TrainCommand:
    """`megatron-deepstack train` on a recipe, running. A context manager: kills it at the end if it still runs."""

    verb = "train"

    def __init__(self, recipe: Recipe, *options: str, environment: Mapping[str, str] | None = None) -> None:
        self.run_dir = Path(recipe.run_dir)
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        file = self.run_dir.with_suffix(".yaml")
        file.write_text(recipe_to_yaml(recipe), encoding="utf-8")
        self.output = self.run_dir.with_suffix(".log")
        command = [sys.executable, "-m", "megatron_deepstack.cli", self.verb, str(file), *options]
        with self.output.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {}), "COLUMNS": "1000"},
            )

    def __enter__(self) -> TrainCommand:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def until(self, came: Callable[[], object], what: str) -> float:
        """Wait for something to come true; seconds waited."""
        begin = time.monotonic()
        while not came():
            assert self.process.poll() is None, f"ended before {what}:\n{self.text}"
            assert time.monotonic() < begin + DEADLINE_SECONDS, f"no {what} in time:\n{self.text}"
            time.sleep(0.01)
        return time.monotonic() - begin

    def until_step(self, step: int) -> int:
        """Wait for a step's record; the newest step then."""
        self.until(lambda: last_step(self.run_dir) >= step, f"step {step}")
        return last_step(self.run_dir)

    def until_saved(self) -> None:
        """Wait for a whole checkpoint to be reported."""
        self.until_said(r"saved \S+step_\d+")

    def until_said(self, words: str) -> float:
        """Wait for a line that matches; seconds waited."""
        return self.until(lambda: re.search(words, self.text), words)

    def pid(self, rank: int) -> int:
        """Process of a rank, as its heartbeat says."""
        return read_beats(self.run_dir)[rank].pid

    def hit(self, rank: int, number: signal.Signals) -> int:
        """Send a signal to a rank; the newest step then."""
        os.kill(self.pid(rank), number)
        return last_step(self.run_dir)

    @property
    def attempts(self) -> int:
        """How many times all ranks have come to train; from then on the run's records are cut to the checkpoint's."""
        return self.text.count("all that learns")

    @property
    def resumed(self) -> int:
        """The step that the last attempt resumed after; 0 where it began anew."""
        steps = re.findall(r"resuming after step (\d+)", self.text.rpartition("all that learns")[2])
        return int(steps[0]) if steps else 0

    def end(self) -> int:
        """Wait for the end; the exit code."""
        return self.process.wait(DEADLINE_SECONDS)


def resumed_after(text: str) -> list[int]:
    """The steps that a command's ranks resumed after, attempt by attempt; nothing for one that began anew."""
    return [int(step) for step in re.findall(r"resuming after step (\d+)", text)]
