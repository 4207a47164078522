"""Models with views of any size (Qwen3-VL): each layout against one rank, packed, frozen, in chunks and with LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from test_training_layouts import _compare, _one_rank, assert_same_training, rows

from megatron_deepstack.config.choices import Batching, EncoderPlacement, Part, Recompute
from megatron_deepstack.config.schema import LoraConfig, ParallelConfig, Recipe, StackConfig
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_qwen3_vl, tiny_recipe
from megatron_deepstack.testing.trial import run_trial

Pools = Callable[[int], RankPool]
INLINE = EncoderPlacement.INLINE
MODEL = tiny_qwen3_vl()
TIED = tiny_qwen3_vl(language=replace(MODEL.language, tied_embeddings=True), stacks=StackConfig(slots=(6, 3)))
"""Stacks on the last and the second of four stages."""

LAYOUTS = [
    ("pp4-tied", 4, 1, ParallelConfig(pipeline=4), TIED),
    ("tp2-sp", 2, 2, ParallelConfig(tensor=2, sequence_parallel=True), MODEL),
    ("dp2-zero-chunks", 2, 1, ParallelConfig(distributed_optimizer=True, encoder_chunk_views=1), MODEL),
    ("pp2-memory", 2, 2, ParallelConfig(pipeline=2, encoder_memory_gib=1.3e-4), MODEL),
    ("pp2-vpp2-tied", 2, 1, ParallelConfig(pipeline=2, virtual_pipeline=2), TIED),
    ("tp2", 2, 2, ParallelConfig(tensor=2), MODEL),
    ("cp2", 2, 2, ParallelConfig(context=2), MODEL),
    ("tp2-cp2-sp", 4, 1, ParallelConfig(tensor=2, context=2, sequence_parallel=True), MODEL),
    ("pp2-dp2-zero", 4, 1, ParallelConfig(pipeline=2, distributed_optimizer=True), TIED),
    ("tp2-pp2-sp", 4, 1, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True), TIED),
    ("pp2-recompute", 2, 1, ParallelConfig(pipeline=2, recompute=Recompute.FULL, recompute_num_layers=2), MODEL),
    ("pp2-inline", 2, 2, ParallelConfig(pipeline=2, encoder_placement=INLINE), MODEL),
    ("tp2-inline", 2, 1, ParallelConfig(tensor=2, encoder_placement=INLINE), MODEL),
]


@pytest.mark.parametrize(
    ("num_ranks", "batch", "parallel", "model"), rows(LAYOUTS, {"pp4-tied", "tp2-sp", "dp2-zero-chunks"})
)
def test_layout_equals_one_rank(ranks: Pools, num_ranks: int, batch: int, parallel: ParallelConfig, model: Any) -> None:
    """Views of different sizes, dealt to ranks by their cost; positions on three axes."""
    _compare(ranks, num_ranks, batch, parallel, model)


@pytest.mark.parametrize(
    "trainable",
    [
        pytest.param((Part.LANGUAGE,), id="language"),
        pytest.param((Part.PROJECTOR,), id="projector", marks=pytest.mark.slow),
        pytest.param((Part.VISION, Part.PROJECTOR), id="vision-projector", marks=pytest.mark.slow),
    ],
)
def test_frozen_parts(ranks: Pools, trainable: tuple[Part, ...]) -> None:
    """The mergers of stacks belong to the projector: with it frozen, none of them learns."""
    _compare(ranks, 2, 1, ParallelConfig(pipeline=2), MODEL, trainable)
    frozen = _one_rank(ranks, MODEL, trainable).first_gradients
    merging = [name for name in frozen if "merger" in name]
    assert bool(merging) is (Part.PROJECTOR in trainable)
    assert any("vision_tower" in name for name in frozen) is (Part.VISION in trainable)


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    rows(
        [
            ("one", 1, ParallelConfig()),
            ("pp2-vpp2", 2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
            ("tp2-sp", 2, ParallelConfig(tensor=2, sequence_parallel=True)),
        ],
        {"one"},
    ),
)
def test_packs_equal_padded_rows(ranks: Pools, num_ranks: int, parallel: ParallelConfig) -> None:
    """The three positions begin at 0 with each sample of a pack."""
    recipe = tiny_recipe(MODEL, parallel)
    recipe = replace(recipe, train=replace(recipe.train, batching=Batching.PACKED, seq_length=64))
    assert_same_training(ranks(num_ranks).run(run_trial, recipe)[0], _one_rank(ranks, MODEL, tuple(Part)))


@pytest.mark.slow
def test_adapters_beside_a_pipeline(ranks: Pools) -> None:
    def recipe(parallel: ParallelConfig) -> Recipe:
        return replace(tiny_recipe(MODEL, parallel), lora=LoraConfig(rank=3, alpha=6.0))

    expected = ranks(1).run(run_trial, recipe(ParallelConfig()))[0]
    assert_same_training(ranks(2).run(run_trial, recipe(ParallelConfig(pipeline=2)))[0], expected)
