"""The decoder's gradients are on their way to the other replicas while the encoder's backward runs; nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_training_layouts import rows

from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.testing.compare import worst
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_recipe
from megatron_deepstack.testing.trial import Trial, run_trial

Pools = Callable[[int], RankPool]


def watch_reductions(rank: int, recipe: Recipe) -> list[float]:
    """For each step the share of the decoder's gradient buckets being reduced when the encoder's backward begins."""
    from megatron_deepstack.step import train_step
    from megatron_deepstack.step.encode import EncoderPass

    engines = []

    class Watched(EncoderPass):
        def backward(self, grad_rows: torch.Tensor) -> None:
            buckets = [bucket for ddp in engines[-1].decoder_ddp for bucket in ddp.bucket_groups]
            shares.append(sum(bucket.grad_reduce_handle is not None for bucket in buckets) / len(buckets))
            super().backward(grad_rows)

    def spread(engine, *rest):  # type: ignore[no-untyped-def]
        engines.append(engine)
        return before[1](engine, *rest)

    shares: list[float] = []
    before = train_step.EncoderPass, train_step._spread
    train_step.EncoderPass, train_step._spread = Watched, spread  # type: ignore[misc]
    try:
        run_trial(rank, recipe)
    finally:
        train_step.EncoderPass, train_step._spread = before  # type: ignore[misc]
    return shares


LAYOUTS = {
    "dp2": (2, ParallelConfig()),
    "dp2-zero": (2, ParallelConfig(distributed_optimizer=True)),
    "cp2": (2, ParallelConfig(context=2)),
    "pp2-vpp2-dp2": (4, ParallelConfig(pipeline=2, virtual_pipeline=2)),
}


@pytest.mark.parametrize(
    ("num_ranks", "parallel"), rows([(name, *row) for name, row in LAYOUTS.items()], {"dp2-zero", "pp2-vpp2-dp2"})
)
def test_reductions_run_beside_the_encoders_backward(ranks: Pools, num_ranks: int, parallel: ParallelConfig) -> None:
    """From the second step on: in the first Megatron learns which gradients come."""
    for shares in ranks(num_ranks).run(watch_reductions, tiny_recipe(parallel=parallel)):
        assert shares == [0.0, 1.0, 1.0]
    waiting = replace(parallel, overlap_grad_reduce=False)
    for shares in ranks(num_ranks).run(watch_reductions, tiny_recipe(parallel=waiting)):
        assert shares == [0.0, 0.0, 0.0]


def test_the_result_is_the_same(ranks: Pools) -> None:
    """Bit for bit: two replicas' sums do not depend on when they are taken."""
    trials: list[Trial] = [
        ranks(2).run(run_trial, tiny_recipe(parallel=ParallelConfig(overlap_grad_reduce=overlap)))[0]
        for overlap in (True, False)
    ]
    assert trials[0].losses == trials[1].losses
    assert worst(trials[0].parameters, trials[1].parameters)[0] == 0.0
