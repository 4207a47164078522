"""Checkpoints of older formats are still read; version 1 was written by Megatron's own save and optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trained_rank import TrainedRank, differing, plain_tensors, saving_recipe

from megatron_deepstack.checkpoint.content.state import METADATA, sharded_state
from megatron_deepstack.checkpoint.folder import Manifest, checkpoint_path, fingerprint, write_manifest
from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.testing.ranks import RankPool

Pools = Callable[[int], RankPool]


def as_it_was(trained: TrainedRank, version: int) -> dict[str, Any]:
    """The sharded state dict of version 2, or of 1: Megatron's, with the states of all data-parallel ranks gathered."""
    if version == 2:
        return sharded_state(trained.model, trained.optimizer.chained, version=2)
    weights = sharded_state(trained.model, None, version=1)["model"]
    singles = trained.optimizer.chained.chained_optimizers
    states = [type(single).sharded_state_dict(single, weights, metadata=dict(METADATA)) for single in singles]
    return {"model": weights, "optimizer": states[0] if len(states) == 1 else dict(enumerate(states))}


def write_then_read(rank: int, recipe: Recipe, version: int) -> list[str]:
    """What differs between a state and the same read from a checkpoint of `version`."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    trained = TrainedRank(recipe)
    trained.step()
    trained.step()
    folder = checkpoint_path(recipe.run_dir, 2)
    if rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(as_it_was(trained, version), str(folder))
    if rank == 0:
        files = {file.name: fingerprint(file) for file in folder.iterdir()}
        write_manifest(folder, Manifest(step=2, facts={}, files=files, version=version))
    dist.barrier()
    (norm,) = [
        key for key in plain_tensors(rank, str(folder)) if key.startswith("decoder.") and "input_layernorm" in key
    ]
    assert norm == "decoder.layers.input_layernorm.weight"
    again = TrainedRank(replace(recipe, train=replace(recipe.train, seed=99)))
    again.load(folder)
    assert again.done == 2
    return differing(again.state(), trained.state())


@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("precision", [pytest.param(Precision.FP32, marks=pytest.mark.slow), Precision.BF16])
@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(ParallelConfig(pipeline=2), id="pp2", marks=pytest.mark.slow),
        pytest.param(ParallelConfig(distributed_optimizer=True), id="dp2-zero"),
    ],
)
def test_the_formats_before_are_read(
    ranks: Pools, tmp_path: Path, parallel: ParallelConfig, precision: Precision, version: int
) -> None:
    assert ranks(2).run(write_then_read, saving_recipe(tmp_path, parallel, precision=precision), version) == [[], []]
