"""The entry point of a training rank, the same under torchrun, Ray and the local launcher."""

from __future__ import annotations

from megatron_deepstack.config.schema import Recipe


def train(recipe: Recipe, stop_after: int | None = None) -> None:
    """Train `recipe` on this rank, from the newest checkpoint of its run folder if there is one.

    Every rank calls it with the same arguments; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say which it is. With
    `stop_after` the run saves and ends after that many steps in all, to be resumed by the same call.
    """
    from megatron_deepstack.platform.megatron_cpu import adapt_megatron

    adapt_megatron()
    import torch.distributed as dist

    from megatron_deepstack.planning.check import check_plan, check_world
    from megatron_deepstack.platform.process_group import join, leave

    join()
    check_plan(recipe)
    check_world(recipe, dist.get_world_size())

    from megatron_deepstack.parallel.groups import create_groups
    from megatron_deepstack.training.loop import run

    run(recipe, create_groups(recipe.parallel, recipe.train.seed), stop_after)
    leave()
