"""The names of the files and folders in a run's folder, which are written nowhere else.

recipe.yaml            the recipe, resolved; every checkpoint holds a copy
plan.json              which stage holds which layers and stacks
starting_weights.json  where each tensor came from when the run began
metrics.jsonl          a line for each logged step
answers.jsonl          what `generate` answered to the held-out questions
answers/               answers to the questions of other stores, one file for each store
evaluations/           answers with their scores, one folder for each evaluation
started_in.txt         the folder to which relative paths of the recipe refer
checkpoints/           checkpoints, whole or being written
tensorboard/           the metrics in TensorBoard's format
profile/               traces of torch.profiler
heartbeats/, stacks/   signs of life of the ranks, and the Python stack of each rank at a hang
launch.json, launch/   state of the driver of a launched run, and what happened to its ranks
logs/                  what each rank of a launched run printed
timeline_step_N.json   a recorded step, for the report
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

RECIPE_FILE: Final = "recipe.yaml"
"""Name of the resolved recipe, in a run's folder and in each of its checkpoints."""
ANSWERS_FILE: Final = "answers.jsonl"
"""Name of answers, in a run's folder and in the folder of an evaluation."""


class RunFolder:
    """The paths in the folder of a run. Nothing is read or created."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        """`run_dir` is the run's folder; it need not exist."""
        self.path = Path(run_dir)

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / RECIPE_FILE

    @property
    def plan(self) -> Path:
        """The stage plan, as JSON."""
        return self.path / "plan.json"

    @property
    def starting_weights(self) -> Path:
        """The origin of each tensor at the run's first step, as JSON."""
        return self.path / "starting_weights.json"

    @property
    def metrics(self) -> Path:
        """A JSON line for each logged step."""
        return self.path / "metrics.jsonl"

    @property
    def answers(self) -> Path:
        """A JSON line for each answered question of the run's held-out store."""
        return self.path / ANSWERS_FILE

    @property
    def other_answers(self) -> Path:
        """Folder of the answers to other stores, or to the first questions of a store."""
        return self.path / "answers"

    @property
    def evaluations(self) -> Path:
        """Folder of evaluations, each in a folder of its own."""
        return self.path / "evaluations"

    @property
    def started_in(self) -> Path:
        """File with the absolute path of the folder in which the run was started."""
        return self.path / "started_in.txt"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's files."""
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        """Folder of profiles."""
        return self.path / "profile"

    @property
    def heartbeats(self) -> Path:
        """Folder of the ranks' signs of life."""
        return self.path / "heartbeats"

    @property
    def stacks(self) -> Path:
        """Folder of the ranks' stacks, written at a hang."""
        return self.path / "stacks"

    @property
    def launch_record(self) -> Path:
        """State of the driver of a launched run, as JSON."""
        return self.path / "launch.json"

    @property
    def launch_events(self) -> Path:
        """A JSON line for each thing that happened to the ranks."""
        return self.path / "launch" / "events.jsonl"

    def log(self, rank: int) -> Path:
        """File with the output of one rank of a launched run."""
        return self.path / "logs" / f"rank_{rank:05d}.log"

    def timeline(self, step: int) -> Path:
        """The recorded timeline of a step, counted from 1."""
        return self.path / f"timeline_step_{step}.json"

    def timelines(self) -> list[Path]:
        """The recorded timelines of all steps, in no particular order."""
        return list(self.path.glob("timeline_step_*.json"))
