"""The entry points of a training rank: one for ranks whose launcher has checked everything, one for torchrun's."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import DeepStackError, RankError
from megatron_deepstack.training.guard.preemption import never


def train(recipe: Recipe, stop_after: int | None = None, asked: Callable[[], bool] = never) -> None:
    """Train `recipe` on this rank, from the newest checkpoint of its run folder if there is one.

    Every rank calls it with the same arguments; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say which it is. The
    launcher holds the lock on the run folder and has checked it.

    Args:
        recipe: The run's recipe.
        stop_after: Save and end after that many steps in all, to be resumed by the same call; None: at the end.
        asked: Called in each step; whether the launcher wants this rank to save and stop.

    Raises:
        PreemptedError: On every rank, after SIGTERM or SIGINT to any, or once `asked` said so on any; all have saved.
        DeepStackError: Any expected failure. What one rank met alone names it; what is `agreed` all ranks raise.
    """
    from megatron_deepstack.platform.compute.megatron_cpu import adapt_megatron

    adapt_megatron()
    from megatron_deepstack.platform.processes.process_group import join, leave

    join(collective_seconds(recipe))
    with _named():
        _run(recipe, stop_after, asked)
    leave()


def train_under_torchrun(load: Callable[[], Recipe], stop_after: int | None, tell: Callable[[str], None]) -> None:
    """Train on a rank that torchrun, or whatever sets RANK and WORLD_SIZE, has started: nothing has been checked.

    Args:
        load: Reads and checks the recipe on this rank.
        stop_after: As in `train`.
        tell: Prints a line for the user.

    Raises:
        DeepStackError: As `train` does; RunFolderError also where another process trains in the run folder.
        RankError: Where another rank has left and this one's connection to it is broken.
    """
    from megatron_deepstack.platform.compute.megatron_cpu import adapt_megatron

    problem, recipe = None, None
    try:
        recipe = load()
    except DeepStackError as error:
        problem = error
    adapt_megatron()
    import torch.distributed as dist

    from megatron_deepstack.parallel.agree import phase
    from megatron_deepstack.platform.files.run_lock import run_lock
    from megatron_deepstack.platform.processes.process_group import DEFAULT_SECONDS, join, leave
    from megatron_deepstack.training.before import check_run_folder
    from megatron_deepstack.training.metrics.wandb_run import require_wandb
    from megatron_deepstack.training.session import is_first_of_node

    with _undisturbed():
        join(DEFAULT_SECONDS if recipe is None else collective_seconds(recipe), problem)
    assert recipe is not None
    with ExitStack() as held, _undisturbed(), _named(), _whose_connections_broke():
        with phase():
            if is_first_of_node():
                check_run_folder(recipe)
        with phase():
            if dist.get_rank() == 0:
                require_wandb(recipe)
                held.enter_context(run_lock(Path(recipe.run_dir), "torchrun", tell))
        _run(recipe, stop_after, never)
    leave()


def _run(recipe: Recipe, stop_after: int | None, asked: Callable[[], bool]) -> None:
    """Train on a rank that has joined. Collective over all ranks."""
    import torch.distributed as dist

    from megatron_deepstack.parallel.agree import phase
    from megatron_deepstack.parallel.groups import create_groups
    from megatron_deepstack.planning.check import check_plan, check_world
    from megatron_deepstack.platform.processes.garbage import settle
    from megatron_deepstack.training.loop import run

    with phase():
        check_plan(recipe)
        check_world(recipe, dist.get_world_size())
    groups = create_groups(recipe.parallel, recipe.train.seed, collective_seconds(recipe))
    settle()
    run(recipe, groups, stop_after, asked)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let a rank that has met an error say it and leave with its own exit code.

    torchrun sends SIGTERM to the other ranks as soon as it sees one end, and the one that has to speak may be slower.
    """
    try:
        yield
    except DeepStackError:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise


@contextmanager
def _named() -> Iterator[None]:
    """Put this rank's number into an error that only this rank meets."""
    try:
        yield
    except DeepStackError as error:
        if not error.agreed:
            error.rank, error.host = int(os.environ["RANK"]), socket.gethostname()
        raise


@contextmanager
def _whose_connections_broke() -> Iterator[None]:
    """Replace the traceback of a rank that another one has left by one line: the other rank says why it left."""
    import torch.distributed as dist

    from megatron_deepstack.platform.processes.cut_off import is_cut_off

    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not is_cut_off(type(error).__name__, str(error)):
            raise
        raise RankError(
            "the connection to another rank is broken, as a rule since that one has ended; what it printed says why "
            f"({str(error).splitlines()[0]})"
        ) from error


def collective_seconds(recipe: Recipe) -> float:
    """Longest wait of a collective: longer than the watchdog waits, so that the watchdog acts first and names ranks.

    Args:
        recipe: The run's recipe.

    Returns:
        Seconds.
    """
    return max(600.0, 4.0 * recipe.health.hang_seconds)
