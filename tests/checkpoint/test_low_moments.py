"""Moments in bf16 (`optimizer.moment_dtype`): training, a checkpoint, and resuming with and without them.

Transformer Engine's AdamW needs a GPU, so a stand-in with its interface and states takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_adam_stand_in import stand_in_adam
from trained_rank import State, TrainedRank, differing, plain_tensors, saving_recipe

from megatron_deepstack.config.choices import GradientDtype, MomentDtype, Precision
from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.testing.ranks import RankPool

Pools = Callable[[int], RankPool]
LAYOUTS = {
    "one": (1, ParallelConfig(distributed_optimizer=True)),
    "dp2": (2, ParallelConfig(distributed_optimizer=True)),
    "tp2": (2, ParallelConfig(tensor=2, distributed_optimizer=True)),
}


def recipe_of(folder: Path, parallel: ParallelConfig, moments: MomentDtype) -> Recipe:
    recipe = saving_recipe(folder, parallel, precision=Precision.BF16)
    return replace(recipe, optimizer=replace(recipe.optimizer, moment_dtype=moments, beta2=0.95, lr=1e-3))


def train(rank: int, recipe: Recipe) -> tuple[Path, list[float], State, State, int]:
    """Three steps, and a save before the last.

    The checkpoint, losses, this rank's state when it was saved and at the end, and the float32 copies that were made.
    """
    with stand_in_adam():
        trained = TrainedRank(recipe)
        losses = [trained.step() for _ in range(2)]
        copies = sum(single.optimizer.copies_made for single in trained.optimizer.chained.chained_optimizers)
        trained.saver.begin(trained.done)
        saved = trained.saver.finish()
        assert saved is not None
        kept = trained.state()
        copies = sum(single.optimizer.copies_made for single in trained.optimizer.chained.chained_optimizers) - copies
        losses.append(trained.step())
        trained.saver.close()
        return saved.path, losses, kept, trained.state(), copies


def resume(rank: int, recipe: Recipe, path: Path) -> tuple[State, float, State]:
    """This rank's state as it was read, the next step's loss, and the state after it."""
    with stand_in_adam():
        trained = TrainedRank(recipe, initial_seed=99)
        trained.load(path)
        read = trained.state()
        loss = trained.step()
        trained.saver.close()
        return read, loss, trained.state()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_goes_on_bit_for_bit(ranks: Pools, tmp_path: Path, layout: str) -> None:
    """Moments are kept and saved as bf16, main parameters as float32, and saving makes no float32 copy of them."""
    num_ranks, parallel = LAYOUTS[layout]
    recipe = recipe_of(tmp_path / "run", parallel, MomentDtype.BF16)
    pool = ranks(num_ranks)
    trained = pool.run(train, recipe)
    resumed = pool.run(resume, recipe, trained[0][0])
    for (_, losses, kept, end, copies), (read, loss, end_again) in zip(trained, resumed, strict=True):
        assert not differing(kept, read)
        assert loss == losses[-1]
        assert not differing(end, end_again)
        assert not copies
        dtypes = {name.split(".")[0]: t.dtype for name, t in kept.items() if name.startswith(("exp_avg", "master"))}
        assert dtypes["exp_avg"] is dtypes["exp_avg_sq"] is torch.bfloat16
        assert dtypes["master_param"] is torch.float32


@pytest.mark.slow
def test_the_setting_may_change_between_runs(ranks: Pools, tmp_path: Path) -> None:
    """Both ways and over layouts: main parameters are equal, and moments but for their rounding."""
    whole = recipe_of(tmp_path / "whole", LAYOUTS["dp2"][1], MomentDtype.FP32)
    low = recipe_of(tmp_path / "low", LAYOUTS["tp2"][1], MomentDtype.BF16)
    again = recipe_of(tmp_path / "again", LAYOUTS["one"][1], MomentDtype.FP32)
    paths = [ranks(2).run(train, whole)[0][0]]
    for recipe, num_ranks in ((low, 2), (again, 1)):
        paths.append(ranks(num_ranks).run(rewrite, recipe, paths[-1])[0])
    first, second, third = (ranks(1).run(plain_tensors, str(path))[0] for path in paths)
    assert first.keys() == second.keys() == third.keys()
    for name, tensor in first.items():
        if ".exp_avg" in name:
            assert second[name].dtype is torch.bfloat16, name
            assert torch.equal(second[name], tensor.bfloat16()), name
            assert torch.equal(third[name], second[name].float()), name
        else:
            assert torch.equal(second[name], tensor), name
            assert torch.equal(third[name], tensor), name


def rewrite(rank: int, recipe: Recipe, path: Path) -> Path:
    """A checkpoint that was read and written again without a step."""
    with stand_in_adam():
        trained = TrainedRank(recipe, initial_seed=99)
        trained.load(path)
        trained.saver.begin(trained.done)
        saved = trained.saver.finish()
        assert saved is not None
        trained.saver.close()
        return saved.path


@pytest.mark.slow
@pytest.mark.parametrize("gradients", list(GradientDtype))
def test_losses_are_those_of_float32_moments(ranks: Pools, tmp_path: Path, gradients: GradientDtype) -> None:
    """Largest difference found in three steps: 2e-4."""
    found = []
    for moments in MomentDtype:
        recipe = recipe_of(tmp_path / moments, LAYOUTS["dp2"][1], moments)
        recipe = replace(recipe, speed=replace(recipe.speed, gradient_dtype=gradients))
        found.append(ranks(2).run(train, recipe)[0][1])
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], abs=5e-4)
