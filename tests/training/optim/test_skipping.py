"""A step with a loss or gradient that is not finite leaves everything as it was, on every rank."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import DataConfig, ParallelConfig, Recipe
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_recipe
from megatron_deepstack.testing.tiny_store import write_tiny_store

Pools = Callable[[int], RankPool]
LAYOUTS = {
    "pp2": ParallelConfig(pipeline=2),
    "dp2": ParallelConfig(),
    "dp2-zero": ParallelConfig(distributed_optimizer=True),
    "tp2-sp": ParallelConfig(tensor=2, sequence_parallel=True),
}
POISONS = {"nan on one rank": (math.nan, 0.0), "inf on one rank": (math.inf, 0.0), "loss": (None, math.nan)}


def _everything(session: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, main parameters, optimizer states and step counters of this rank."""
    for number, ddp in enumerate(session.engine.wrapped):
        for name, parameter in ddp.named_parameters():
            yield f"model {number} {name}", parameter
    for number, single in enumerate(session.optimizer.chained.chained_optimizers):
        for place, group in enumerate(single.optimizer.param_groups):
            yield f"{number} {place} step", torch.as_tensor(group.get("step", 0))
            for index, parameter in enumerate(group["params"]):
                yield f"{number} {place} {index}", parameter
                for key, value in single.optimizer.state[parameter].items():
                    yield f"{number} {place} {index} {key}", torch.as_tensor(value)


def _snapshot(session: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _everything(session)}


def _changed(before: dict[str, torch.Tensor], session: Any) -> list[str]:
    after = _snapshot(session)
    assert before.keys() == after.keys()
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


@dataclass(frozen=True)
class Skipped:
    """What a poisoned step and the good one after it did on a rank."""

    found: int
    """Tensors there were."""
    applied: bool
    changed: list[str]
    """Names of those that the poisoned step changed."""
    changed_later: int
    """How many the good one changed."""


def _skip_steps(rank: int, recipe: Recipe) -> list[Skipped]:
    """Two good steps, then a poisoned and a good one for each of `POISONS`."""
    from megatron_deepstack.step.clock import StepClock
    from megatron_deepstack.step.train_step import forward_backward
    from megatron_deepstack.training.loop import _Agreement
    from megatron_deepstack.training.session import start_session

    session = start_session(recipe, groups_for(recipe.parallel))

    def train(step: int, gradient: float | None = None, loss: float = 0.0) -> bool:
        loaded = session.reader.load(step)
        found = forward_backward(session.engine, loaded.plan, torch.from_numpy(loaded.pixels), StepClock())
        if gradient is not None and rank == 1:
            buffer = session.engine.wrapped[0].buffers[0].grad_data
            buffer[len(buffer) // 2] = gradient
        agreement = _Agreement(loss or found.mean, asked=False)
        return session.optimizer.step(step, agreement).applied

    assert train(0)
    assert train(1)
    skipped = []
    for number, (gradient, loss) in enumerate(POISONS.values()):
        before = _snapshot(session)
        applied = train(2 + 2 * number, gradient, loss)
        changed = _changed(before, session)
        assert train(3 + 2 * number)
        skipped.append(Skipped(len(before), applied, changed, len(_changed(before, session))))
    session.saver.close()
    return skipped


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_store(tmp_path_factory.mktemp("skipping") / "store.zarr")


def layouts_by_precision(layouts: Iterable[str]) -> list[Any]:
    """All pairs; each layout is quick in one precision, and the precisions take turns; the longest is quick in none."""
    return [
        pytest.param(
            layout,
            precision,
            id=f"{layout}-{precision}",
            marks=[pytest.mark.slow] * ((row + column) % 2 or layout == "tp2-sp"),
        )
        for row, layout in enumerate(layouts)
        for column, precision in enumerate((Precision.BF16, Precision.FP32))
    ]


@pytest.mark.parametrize(("layout", "precision"), layouts_by_precision(LAYOUTS))
def test_a_poisoned_step_changes_nothing(
    ranks: Pools, store: Path, tmp_path: Path, layout: str, precision: Precision
) -> None:
    recipe = tiny_recipe(parallel=LAYOUTS[layout], precision=precision)
    recipe = replace(recipe, train=replace(recipe.train, steps=100))  # the rate hardly falls
    recipe = replace(recipe, data=DataConfig(store=str(store)), run_dir=str(tmp_path / "run"))
    for on_rank in ranks(2).run(_skip_steps, recipe):
        for poison, skipped in zip(POISONS, on_rank, strict=True):
            assert (poison, skipped.applied, skipped.changed) == (poison, False, [])
            assert skipped.changed_later > skipped.found / 2, poison


def _save_before_any_update(rank: int, recipe: Recipe) -> list[list[str]]:
    """A left-out first step is saved, then an applied one; what differs from either where it is loaded again."""
    from megatron_deepstack.step.clock import StepClock
    from megatron_deepstack.step.train_step import forward_backward
    from megatron_deepstack.training.session import resume, start_session

    expected = []
    session = start_session(recipe, groups_for(recipe.parallel))
    assert resume(session).step == 0
    for step, trusted in enumerate((False, True)):
        loaded = session.reader.load(step)
        forward_backward(session.engine, loaded.plan, torch.from_numpy(loaded.pixels), StepClock())
        assert session.optimizer.step(step, lambda norm: trusted).applied is trusted  # noqa: B023 - called at once
        expected.append(_snapshot(session))
        session.saver.begin(step + 1)
        assert session.saver.finish() is not None
    session.saver.close()
    changed = [_changed(expected[step - 1], _resumed_at(recipe, rank, step)) for step in (2, 1)]
    # torch's Adam counts updates beside each parameter's states; only Megatron's loading notes them in groups too.
    return [[name for name in names if not re.fullmatch(r"\d+ \d+ step", name)] for names in changed]


def _resumed_at(recipe: Recipe, rank: int, step: int) -> Any:
    """A new session resumed from the checkpoint after `step`, which the newer ones make way for."""
    import shutil

    import torch.distributed as dist

    from megatron_deepstack.checkpoint.folder import checkpoint_path
    from megatron_deepstack.training.session import resume, start_session

    dist.barrier()  # the newer one has been read
    if rank == 0:
        shutil.rmtree(checkpoint_path(recipe.run_dir, step + 1), ignore_errors=True)
    dist.barrier()
    session = start_session(recipe, groups_for(recipe.parallel))
    assert resume(session).step == step
    session.saver.close()
    return session


@pytest.mark.parametrize(("layout", "precision"), layouts_by_precision(["pp2", "dp2-zero"]))
def test_a_save_before_the_first_update_is_whole_and_so_are_later_ones(
    ranks: Pools, store: Path, tmp_path: Path, layout: str, precision: Precision
) -> None:
    recipe = tiny_recipe(parallel=LAYOUTS[layout], precision=precision)
    recipe = replace(recipe, data=DataConfig(store=str(store)), run_dir=str(tmp_path / "run"))
    for changed in ranks(2).run(_save_before_any_update, recipe):
        assert changed == [[], []]
