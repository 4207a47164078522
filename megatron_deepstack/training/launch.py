"""Training on this machine from one command, and starting it again after a rank died or hung."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import DeepStackError, HangError
from megatron_deepstack.platform.files.run_lock import run_lock
from megatron_deepstack.platform.processes.local_ranks import launch_ranks
from megatron_deepstack.training.before import check_run_folder
from megatron_deepstack.training.guard.watchdog import last_hang
from megatron_deepstack.training.main import train
from megatron_deepstack.training.metrics.wandb_run import require_wandb
from megatron_deepstack.training.retry import Failure, failure_of, is_worth_a_retry
from megatron_deepstack.training.session import check_data

_STOPPED = (
    "stopped on request before there was anything new to save; run the same command again to go on from the newest "
    "checkpoint"
)


def train_here(
    recipe: Recipe,
    *,
    num_ranks: int,
    say: Callable[[str], None],
    stop_after: int | None = None,
    restarts: int = 0,
) -> None:
    """Train on `num_ranks` processes of this machine and wait for them.

    What can be found wrong with stores, run folder and checkpoints without ranks is found before they start, and no
    other `train`, torchrun or `launch` works in the run folder meanwhile. After a failure that another attempt may not
    meet, all ranks start again from the newest whole checkpoint.

    Args:
        recipe: The run's recipe.
        num_ranks: Processes.
        say: Prints a line for the user.
        stop_after: Save and end after that many steps in all; None: at the end.
        restarts: How often to start again at most; `say` is told why.

    Raises:
        DeepStackError: What ended the last attempt.
        RunFolderError: The run folder cannot be written or has too little room, or another process trains in it.
    """
    require_wandb(recipe)
    check_data(recipe)
    check_run_folder(recipe)
    with run_lock(Path(recipe.run_dir), "train", say):
        _attempts(recipe, num_ranks, say, stop_after, restarts)


def _attempts(
    recipe: Recipe, num_ranks: int, say: Callable[[str], None], stop_after: int | None, restarts: int
) -> None:
    previous: Failure | None = None
    for left in range(restarts, -1, -1):
        try:
            launch_ranks(train, num_ranks, recipe, stop_after, stopped=_STOPPED)
            return
        except DeepStackError as error:
            found = _in_full(recipe, error)
            failure = failure_of(found)
            if not is_worth_a_retry(failure, previous):
                raise found from None
            if not left:
                raise type(found)(f"{found}\n{_advice(restarts)}") from None
            say(f"{found}\nstarting all ranks again from the newest whole checkpoint; restarts left: {left - 1}")
            previous = failure


def _in_full(recipe: Recipe, error: DeepStackError) -> DeepStackError:
    """The error; if it is a hang, together with what the ranks found out about it."""
    if isinstance(error, HangError):
        return HangError(last_hang(Path(recipe.run_dir)) or str(error))
    return error


def _advice(restarts: int) -> str:
    used = f"all {restarts} restarts are used; " if restarts else ""
    return f"{used}run the same command again to go on from the newest checkpoint; --restarts N does so by itself"
