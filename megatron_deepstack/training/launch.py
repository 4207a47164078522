"""Training on this machine from one command, and starting it again after a rank died or hung."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.order.steps import Share, open_reader, open_training_reader
from megatron_deepstack.errors import DeepStackError, HangError
from megatron_deepstack.platform.local_ranks import launch_ranks
from megatron_deepstack.training.guard.watchdog import last_hang
from megatron_deepstack.training.main import train
from megatron_deepstack.training.metrics.wandb_run import require_wandb
from megatron_deepstack.training.retry import Failure, failure_of, is_worth_a_retry


def train_here(
    recipe: Recipe,
    *,
    num_ranks: int,
    say: Callable[[str], None],
    stop_after: int | None = None,
    restarts: int = 0,
) -> None:
    """Train on `num_ranks` processes of this machine and wait for them.

    After a failure that another attempt may not meet, all ranks start again from the newest whole checkpoint, at most
    `restarts` times; `say` is told why. Raises the error that ended the last attempt. What can be found wrong with
    stores and checkpoints without ranks is found before they start.
    """
    _check_data(recipe)
    previous: Failure | None = None
    for left in range(restarts, -1, -1):
        try:
            launch_ranks(train, num_ranks, recipe, stop_after)
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


def _check_data(recipe: Recipe) -> None:
    require_wandb(recipe)
    alone = Share(dp=0, num_replicas=1, replica_rank=0)
    open_training_reader(recipe, alone)
    if recipe.train.validation_interval and recipe.data.validation_store is not None:
        open_reader(recipe, recipe.data.validation_store, alone)


def _in_full(recipe: Recipe, error: DeepStackError) -> DeepStackError:
    """The error; of a hang, what the ranks found out about it."""
    if isinstance(error, HangError):
        return HangError(last_hang(Path(recipe.run_dir)) or str(error))
    return error


def _advice(restarts: int) -> str:
    used = f"all {restarts} restarts are used; " if restarts else ""
    return f"{used}run the same command again to go on from the newest checkpoint; --restarts N does so by itself"
