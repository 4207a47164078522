"""Records of a run at Weights & Biases, an extra: `pip install 'megatron-deepstack[wandb]'`.

A resumed run goes on as the same run there: its id lies in the run folder. WANDB_MODE=offline writes it to RUN/wandb,
and asks nothing of the network; `wandb sync` uploads it later.
"""

from __future__ import annotations

import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_deepstack.config.build import plain
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.platform.files.write_whole import write_whole
from megatron_deepstack.training.metrics.record import StepRecord

_ID_FILE = "wandb_run_id"


def require_wandb(recipe: Recipe) -> None:
    """Raise ConfigError if the recipe wants Weights & Biases and the package is missing."""
    project = recipe.logging.wandb_project
    if project is not None and find_spec("wandb") is None:
        raise ConfigError(
            [
                f"logging.wandb_project: is {project!r}, and the package wandb is not installed; "
                "pip install 'megatron-deepstack[wandb]', or set it to null"
            ]
        )


class WandbRun:
    """A run of the recipe's project."""

    def __init__(self, recipe: Recipe) -> None:
        """Raises ConfigError where the package is missing or the service refuses."""
        require_wandb(recipe)
        import wandb

        folder = Path(recipe.run_dir)
        try:
            self._run: Any = wandb.init(
                project=recipe.logging.wandb_project,
                name=recipe.name,
                id=_run_id(folder / _ID_FILE),
                resume="allow",
                dir=str(folder),
                config=plain(recipe),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                [
                    f"logging.wandb_project: Weights & Biases answers: {error}; run `wandb login`, set WANDB_API_KEY, "
                    "or set WANDB_MODE=offline to upload later"
                ]
            ) from error
        # Steps that are run again after a resumption are behind the service's own counter, which drops them.
        self._run.define_metric("*", step_metric="step")

    def add(self, record: StepRecord) -> None:
        """Send one step."""
        self._run.log(dict(record.scalars))

    def close(self) -> None:
        """Send what is still held back."""
        self._run.finish()


def _run_id(file: Path) -> str:
    """The run's id there, made once."""
    if not file.exists():
        write_whole(file, secrets.token_hex(8))
    return file.read_text(encoding="utf-8").strip()
