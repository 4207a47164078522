"""Checkpoints of format version 1, written by Megatron's own save and optimizers, are still read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trained_rank import TrainedRank, differing, saving_recipe

from megatron_deepstack.checkpoint.folder import Manifest, checkpoint_path, fingerprint, write_manifest
from megatron_deepstack.checkpoint.state import METADATA, sharded_state
from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.testing.ranks import RankPool

Pools = Callable[[int], RankPool]


def as_it_was(trained: TrainedRank) -> dict[str, Any]:
    """The sharded state dict of version 1: Megatron's, with the states of all data-parallel ranks gathered."""
    weights = sharded_state(trained.model, None)["model"]
    singles = trained.optimizer.chained.chained_optimizers
    states = [type(single).sharded_state_dict(single, weights, metadata=dict(METADATA)) for single in singles]
    return {"model": weights, "optimizer": states[0] if len(states) == 1 else dict(enumerate(states))}


def write_then_read(rank: int, recipe: Recipe) -> list[str]:
    """What differs between a state and the same read from a checkpoint of version 1."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    trained = TrainedRank(recipe)
    trained.step()
    trained.step()
    folder = checkpoint_path(recipe.run_dir, 2)
    if rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(as_it_was(trained), str(folder))
    if rank == 0:
        files = {file.name: fingerprint(file) for file in folder.iterdir()}
        write_manifest(folder, Manifest(step=2, facts={}, files=files, version=1))
    dist.barrier()
    again = TrainedRank(replace(recipe, train=replace(recipe.train, seed=99)))
    again.load(folder)
    assert again.done == 2
    return differing(again.state(), trained.state())


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(pipeline=2), ParallelConfig(distributed_optimizer=True)],
    ids=["pp2", "dp2-zero"],
)
def test_the_format_before_is_read(
    ranks: Pools, tmp_path: Path, parallel: ParallelConfig, precision: Precision
) -> None:
    assert ranks(2).run(write_then_read, saving_recipe(tmp_path, parallel, precision=precision)) == [[], []]
