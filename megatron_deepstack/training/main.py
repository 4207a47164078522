"""The entry point of a training rank, the same under torchrun, Ray and the local launcher."""

from __future__ import annotations

from collections.abc import Callable

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.training.guard.preemption import never


def train(recipe: Recipe, stop_after: int | None = None, asked: Callable[[], bool] = never) -> None:
    """Train `recipe` on this rank, from the newest checkpoint of its run folder if there is one.

    Every rank calls it with the same arguments; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say which it is. With
    `stop_after` the run saves and ends after that many steps in all, to be resumed by the same call. After SIGTERM or
    SIGINT to any rank, or once `asked` says so on any (it is called in each step), all save and raise PreemptedError.
    """
    from megatron_deepstack.platform.megatron_cpu import adapt_megatron

    adapt_megatron()
    import torch.distributed as dist

    from megatron_deepstack.planning.check import check_plan, check_world
    from megatron_deepstack.platform.process_group import join, leave

    timeout = collective_seconds(recipe)
    join(timeout)
    check_plan(recipe)
    check_world(recipe, dist.get_world_size())

    from megatron_deepstack.parallel.groups import create_groups
    from megatron_deepstack.platform.garbage import settle
    from megatron_deepstack.training.loop import run

    settle()
    run(recipe, create_groups(recipe.parallel, recipe.train.seed, timeout), stop_after, asked)
    leave()


def collective_seconds(recipe: Recipe) -> float:
    """Longest wait of a collective: beyond the watchdog's patience, so that the watchdog is first and names ranks."""
    return max(600.0, 4.0 * recipe.health.hang_seconds)
