"""What can be found wrong with a run folder before ranks start, by `train` itself or by a node's first rank."""

from __future__ import annotations

from pathlib import Path

from megatron_deepstack.checkpoint.folder import step_folders
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.planning.budget.footprint import checkpoint_bytes, checkpoints_at_once
from megatron_deepstack.platform.files.run_disk import require_room, require_writable


def check_run_folder(recipe: Recipe) -> None:
    """Make sure that the run folder can be written and that its disk has room for the checkpoints to come.

    Checkpoints that lie there already make room for later ones. A finished run needs none.

    Args:
        recipe: The run's recipe.

    Raises:
        RunFolderError: It cannot be written, or there is too little room.
    """
    run_dir = Path(recipe.run_dir)
    require_writable(run_dir)
    steps = [step for step, _ in step_folders(run_dir)]
    if steps and steps[-1] >= recipe.train.steps:
        return
    number = max(checkpoints_at_once(recipe) - len(steps), 1)
    what = f"{number} checkpoints (checkpoint.keep {recipe.checkpoint.keep})" if number > 1 else "a checkpoint"
    require_room(run_dir, number * checkpoint_bytes(recipe), what)
