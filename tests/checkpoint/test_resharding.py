"""A checkpoint of one layout, read and written again by another, holds the same tensors, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trained_rank import State, TrainedRank, differing, plain_tensors, saving_recipe

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import LoraConfig, ParallelConfig, Recipe
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.testing.ranks import RankPool

Pools = Callable[[int], RankPool]


def train_and_save(rank: int, recipe: Recipe) -> tuple[Path, float]:
    """The checkpoint after two steps, and the loss of the third."""
    trained = TrainedRank(recipe)
    for _ in range(2):
        trained.step()
    return _save_and_train(trained)


def load_and_save(rank: int, recipe: Recipe, path: Path) -> tuple[Path, float]:
    """The checkpoint of two steps written again by this layout, and the loss of the third step in it."""
    trained = TrainedRank(recipe, initial_seed=99)
    trained.load(path)
    assert trained.done == 2
    return _save_and_train(trained)


def _save_and_train(trained: TrainedRank) -> tuple[Path, float]:
    trained.saver.begin(trained.done)
    saved = trained.saver.finish()
    assert saved is not None
    loss = trained.step()
    trained.saver.close()
    return saved.path, loss


ZERO = ParallelConfig(distributed_optimizer=True)
LAYOUTS = {
    "one": (1, ParallelConfig()),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "pp2-vpp2": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "tp2-sp": (2, ParallelConfig(tensor=2, sequence_parallel=True)),
    "cp2": (2, ParallelConfig(context=2)),
    "dp2": (2, ParallelConfig()),
    "dp2-zero": (2, ZERO),
    "pp4": (4, ParallelConfig(pipeline=4)),
    "dp4-zero": (4, ZERO),
    "tp2-dp2-zero": (4, replace(ZERO, tensor=2)),
    "pp2-dp2-zero": (4, replace(ZERO, pipeline=2)),
}
FP32, BF16 = Precision.FP32, Precision.BF16
CHANGES = [
    (FP32, "pp4", "pp2", "one"),
    (BF16, "pp2-vpp2", "tp2-sp", "tp2-dp2-zero"),
    (FP32, "one", "dp2-zero", "tp2-sp"),
    (BF16, "dp4-zero", "dp2-zero", "one"),
    (FP32, "tp2-dp2-zero", "pp2-dp2-zero", "cp2"),
    (BF16, "cp2", "pp4", "pp2-dp2-zero"),
    (FP32, "dp2", "pp2-vpp2", "dp4-zero"),
    (BF16, "pp2", "dp2"),
]
"""Each layout reads or writes in both precisions."""


@pytest.mark.parametrize(
    ("precision", "chain"),
    [
        pytest.param(precision, chain, id=f"{precision}-{'>'.join(chain)}", marks=[pytest.mark.slow] * (number != 1))
        for number, (precision, *chain) in enumerate(CHANGES)
    ],
)
def test_tensors_survive_a_change_of_layout(
    ranks: Pools, tmp_path: Path, chain: list[str], precision: Precision
) -> None:
    """Fewer ranks and more, with and without the distributed optimizer; then the next step's loss is the same."""
    found: list[State] = []
    losses = []
    path: Path | None = None
    for name in chain:
        num_ranks, parallel = LAYOUTS[name]
        recipe = saving_recipe(tmp_path / name, parallel, precision=precision)
        pool = ranks(num_ranks)
        path, loss = (pool.run(train_and_save, recipe) if path is None else pool.run(load_and_save, recipe, path))[0]
        found.append(ranks(1).run(plain_tensors, str(path))[0])
        losses.append(loss)
    names = list(found[0])
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in names)
    assert any("fp32_param" in name for name in names) == (precision is Precision.BF16)
    for later in found[1:]:
        assert differing(later, found[0]) == []
    assert losses[1:] == pytest.approx(losses[:1] * len(losses[1:]), rel=2e-5 if precision is Precision.FP32 else 5e-3)


def test_adapters_survive_a_change_of_layout(ranks: Pools, tmp_path: Path) -> None:
    lora = LoraConfig(rank=4)
    written = replace(saving_recipe(tmp_path / "pp2", ParallelConfig(pipeline=2)), lora=lora)
    first, _ = ranks(2).run(train_and_save, written)[0]
    read = replace(saving_recipe(tmp_path / "tp2", ParallelConfig(tensor=2)), lora=lora)
    second, _ = ranks(2).run(load_and_save, read, first)[0]
    ours, theirs = (ranks(1).run(plain_tensors, str(path))[0] for path in (first, second))
    assert differing(ours, theirs) == []


EMPTY_FIRST = ParallelConfig(pipeline=2, layers_per_stage=(0, 8))


@pytest.mark.parametrize(
    "chain",
    [("empty", "empty", "one"), pytest.param(("one", "empty"), marks=pytest.mark.slow)],
    ids=lambda chain: ">".join(chain),
)
def test_a_stage_without_parameters_of_a_kind(ranks: Pools, tmp_path: Path, chain: tuple[str, ...]) -> None:
    """The embedding alone has nothing without weight decay: a group of rank 0's optimizer is empty, others' are not."""
    layouts = {"empty": (2, EMPTY_FIRST), "one": (1, ParallelConfig())}
    found: list[State] = []
    path: Path | None = None
    for number, name in enumerate(chain):
        num_ranks, parallel = layouts[name]
        recipe = saving_recipe(tmp_path / f"{number}", parallel, precision=BF16)
        call = (train_and_save, recipe) if path is None else (load_and_save, recipe, path)
        path, _ = ranks(num_ranks).run(*call)[0]
        found.append(ranks(1).run(plain_tensors, str(path))[0])
    for later in found[1:]:
        assert differing(later, found[0]) == []


def refusal(rank: int, recipe: Recipe, path: Path) -> str:
    """The words with which a checkpoint of another model is refused."""
    trained = TrainedRank(recipe)
    try:
        trained.load(path)
    except CheckpointError as error:
        return str(error)
    return ""


def test_norms_are_named_as_transformer_engine_names_them(ranks: Pools, tmp_path: Path) -> None:
    """Its layers own them together with the linears behind, and so each kind of layers reads the other's."""
    path, _ = ranks(2).run(train_and_save, saving_recipe(tmp_path, ZERO))[0]
    names = set(ranks(1).run(plain_tensors, str(path))[0])
    for norm in ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"):
        assert {f"decoder.layers.{norm}", f"optimizer.state.exp_avg.decoder.layers.{norm}"} <= names
    assert not [name for name in names if "decoder.layers.input_layernorm" in name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qk_norm": True}, "q_layernorm"),
        ({"ffn_hidden_size": 96}, "linear_fc1"),
    ],
    ids=["missing", "another-shape"],
)
def test_what_does_not_fit_is_refused_alike_on_every_rank(
    ranks: Pools, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    recipe = saving_recipe(tmp_path)
    path, _ = ranks(2).run(train_and_save, recipe)[0]
    other = replace(recipe, model=replace(recipe.model, language=replace(recipe.model.language, **change)))
    first, second = ranks(2).run(refusal, other, path)
    assert first == second
    assert "cannot be read into this model" in first
    assert words in first
