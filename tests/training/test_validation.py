"""Held-out batches: the same each time, planned once, and like those that the reader makes of the same samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.data.order.prefetch import Prefetcher
from megatron_deepstack.data.order.steps import Share, StepReader
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.step.train_step import StepLoss
from megatron_deepstack.testing.tiny import tiny_recipe
from megatron_deepstack.testing.tiny_store import SAMPLES, write_tiny_store
from megatron_deepstack.training import validation
from megatron_deepstack.training.validation import HeldOutBatches, Validation


def reader_of(root: Path, batch_size: int, replica: int = 0) -> StepReader:
    recipe = tiny_recipe(parallel=ParallelConfig(), global_batch_size=batch_size)
    train = replace(recipe.train, micro_batch_size=2)
    share = Share(dp=replica, num_replicas=2, replica_rank=0)
    return StepReader(Store.open(str(root)), recipe.model, recipe.parallel, train, share)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_store(tmp_path_factory.mktemp("held-out") / "store.zarr")


@pytest.mark.parametrize("kept", [0, 1, 16])
def test_batches_are_the_same_each_time(root: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(validation, "_KEPT_PLANS", kept)
    for replica in range(2):
        reader = reader_of(root, 4, replica)
        plan_samples = Mock(side_effect=reader.plan_samples)
        monkeypatch.setattr(reader, "plan_samples", plan_samples)
        batches = HeldOutBatches(reader)
        assert len(batches) == len(SAMPLES) // 4
        rounds = [list(Prefetcher(batches, 0, len(batches))) for _ in range(2)]
        for batch, (first, second) in enumerate(zip(*rounds, strict=True)):
            order = np.arange(batch * 4, batch * 4 + 4)
            expected = reader_of(root, 4, replica).load_samples(batch, order)
            for found in (first, second):
                assert np.array_equal(found.samples, expected.samples)
                assert np.array_equal(found.pixels, expected.pixels)
                assert all(map(np.array_equal, found.plan.labels, expected.plan.labels))
                assert (found.num_tokens, found.members) == (expected.num_tokens, expected.members)
        assert plan_samples.call_count == len(batches) + max(len(batches) - kept, 0)


def test_what_validation_computes_is_no_work_of_a_step(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else slow ranks would be sought by the time of other passes than those of training steps."""
    seen, config = [], SimpleNamespace(timers="those of steps")

    def loss(*_: object) -> StepLoss:
        seen.append(config.timers)
        return StepLoss(total=3.0, num_tokens=2)

    monkeypatch.setattr(validation, "held_out_loss", loss)
    session: Any = SimpleNamespace(engine=SimpleNamespace(model=SimpleNamespace(config=config)))
    held_out = Validation(session, HeldOutBatches(reader_of(root, 4)), interval=1)
    assert held_out.loss(lambda _: None, lambda: False) == 1.5
    assert seen == [None] * len(held_out.batches)
    assert config.timers == "those of steps"
    assert held_out.loss(lambda _: None, lambda: True) is None, "left before the first batch"


def test_a_store_smaller_than_a_batch_repeats(tmp_path: Path) -> None:
    batches = HeldOutBatches(reader_of(write_tiny_store(tmp_path / "small", samples=((0,), (4,), ())), 4))
    assert len(batches) == 1
    assert batches.load(0).samples.tolist() == [0, 1, 2, 0]
    small = HeldOutBatches(reader_of(tmp_path / "small", 4, replica=1))
    members = [one for loaded in (batches.load(0), small.load(0)) for rows in loaded.members for one in rows]
    assert sorted(index for one in members for index in one) == [0, 0, 1, 2]
