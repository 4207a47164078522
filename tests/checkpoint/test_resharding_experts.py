"""Checkpoints of decoders with experts: read and written again under other sharings of experts, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_resharding import load_and_save, train_and_save
from trained_rank import State, differing, plain_tensors, saving_recipe

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_qwen3_vl_moe

Pools = Callable[[int], RankPool]
MODEL = tiny_qwen3_vl_moe()
SOME = tiny_qwen3_vl_moe(dense_layers=(0, 5), num_experts=4)
LAYOUTS = {
    "one": (1, ParallelConfig()),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "ep2": (2, ParallelConfig(expert=2)),
    "ep2-zero": (2, ParallelConfig(expert=2, distributed_optimizer=True)),
    "tp2-sp": (2, ParallelConfig(tensor=2, sequence_parallel=True)),
    "tp2-sp-ep2-zero": (2, ParallelConfig(tensor=2, sequence_parallel=True, expert=2, distributed_optimizer=True)),
    "pp2-ep2-zero": (4, ParallelConfig(pipeline=2, expert=2, distributed_optimizer=True)),
    "ep4": (4, ParallelConfig(expert=4)),
    "ep2-dp2-zero": (4, ParallelConfig(expert=2, distributed_optimizer=True)),
}
FP32, BF16 = Precision.FP32, Precision.BF16
CHANGES = [
    (FP32, MODEL, "ep2-zero", "one", "tp2-sp-ep2-zero"),
    (BF16, MODEL, "pp2-ep2-zero", "ep2", "ep2-dp2-zero"),
    (FP32, SOME, "tp2-sp", "ep4", "pp2"),
    (BF16, SOME, "one", "pp2-ep2-zero", "tp2-sp"),
]


@pytest.mark.parametrize(
    ("precision", "model", "chain"),
    [
        pytest.param(precision, model, chain, id=f"{precision}-{'>'.join(chain)}")
        for precision, model, *chain in CHANGES
    ],
)
@pytest.mark.slow
def test_experts_survive_a_change_of_layout(
    ranks: Pools, tmp_path: Path, precision: Precision, model: object, chain: list[str]
) -> None:
    """Each expert is one slice of a tensor, whoever holds it; weights and states of the optimizer alike."""
    found: list[State] = []
    losses = []
    path: Path | None = None
    for name in chain:
        num_ranks, parallel = LAYOUTS[name]
        recipe = saving_recipe(tmp_path / name, parallel, precision=precision, model=model)
        pool = ranks(num_ranks)
        path, loss = (pool.run(train_and_save, recipe) if path is None else pool.run(load_and_save, recipe, path))[0]
        found.append(ranks(1).run(plain_tensors, str(path))[0])
        losses.append(loss)
    assert any("experts" in name and name.startswith("optimizer.state.exp_avg.") for name in found[0])
    for later in found[1:]:
        assert differing(later, found[0]) == []
    assert losses[1:] == pytest.approx(losses[:1] * len(losses[1:]), rel=2e-5 if precision is FP32 else 5e-3)
