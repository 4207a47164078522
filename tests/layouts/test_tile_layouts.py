"""Models with padded tiles and stacks on every stage (Granite 4 Vision): each layout against one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from test_training_layouts import _compare, _one_rank, assert_same_training, rows

from megatron_deepstack.config.choices import Batching, EncoderPlacement, Part, Recompute
from megatron_deepstack.config.schema import LoraConfig, ParallelConfig, Recipe
from megatron_deepstack.planning.slots import decoder_slots, owner, stage_chunks
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_granite, tiny_recipe
from megatron_deepstack.testing.trial import run_trial

Pools = Callable[[int], RankPool]
INLINE = EncoderPlacement.INLINE
MODEL = tiny_granite()
TIED = tiny_granite(language=replace(MODEL.language, tied_embeddings=True))
LAYOUTS = [
    ("pp4-tied", 4, 1, ParallelConfig(pipeline=4), TIED),
    ("tp2-sp", 2, 2, ParallelConfig(tensor=2, sequence_parallel=True), MODEL),
    ("dp2-zero-chunks", 2, 1, ParallelConfig(distributed_optimizer=True, encoder_chunk_views=1), MODEL),
    ("pp2-vpp2-tied", 2, 1, ParallelConfig(pipeline=2, virtual_pipeline=2), TIED),
    ("cp2", 2, 2, ParallelConfig(context=2), MODEL),
    ("tp2-cp2-sp", 4, 1, ParallelConfig(tensor=2, context=2, sequence_parallel=True), MODEL),
    ("pp2-dp2-zero", 4, 1, ParallelConfig(pipeline=2, distributed_optimizer=True), TIED),
    ("tp2-pp2-sp", 4, 1, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True), MODEL),
    ("pp2-recompute", 2, 1, ParallelConfig(pipeline=2, recompute=Recompute.FULL, recompute_num_layers=2), MODEL),
    ("tp2-inline", 2, 2, ParallelConfig(tensor=2, encoder_placement=INLINE), MODEL),
]


def test_each_stage_of_four_takes_a_stack() -> None:
    chunks = stage_chunks(MODEL.language.num_layers, ParallelConfig(pipeline=4))
    assert {owner(slot, chunks) for slot in decoder_slots(MODEL)} == {0, 1, 2, 3}


@pytest.mark.parametrize(("num_ranks", "batch", "parallel", "model"), rows(LAYOUTS, {"pp4-tied"}))
def test_layout_equals_one_rank(ranks: Pools, num_ranks: int, batch: int, parallel: ParallelConfig, model: Any) -> None:
    """Images of many shapes, some of whose tiles are all padding."""
    _compare(ranks, num_ranks, batch, parallel, model)


@pytest.mark.parametrize("trainable", [(Part.LANGUAGE,), (Part.PROJECTOR,), (Part.VISION,)], ids=lambda v: str(v[0]))
@pytest.mark.slow
def test_frozen_parts(ranks: Pools, trainable: tuple[Part, ...]) -> None:
    """Q-Formers and the newline belong to the projector."""
    _compare(ranks, 2, 1, ParallelConfig(pipeline=2), MODEL, trainable)
    moving = _one_rank(ranks, MODEL, trainable).first_gradients
    assert any("_projectors" in name for name in moving) is (Part.PROJECTOR in trainable)
    assert ("model.image_newline" in moving) is (Part.PROJECTOR in trainable)
    assert any("vision_tower" in name for name in moving) is (Part.VISION in trainable)


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [(1, ParallelConfig()), (2, ParallelConfig(pipeline=2)), (2, ParallelConfig(context=2))],
    ids=["one", "pp2", "cp2"],
)
@pytest.mark.slow
def test_packs_equal_padded_rows(ranks: Pools, num_ranks: int, parallel: ParallelConfig) -> None:
    recipe = tiny_recipe(MODEL, parallel)
    recipe = replace(recipe, train=replace(recipe.train, batching=Batching.PACKED, seq_length=128))
    assert_same_training(ranks(num_ranks).run(run_trial, recipe)[0], _one_rank(ranks, MODEL, tuple(Part)))


@pytest.mark.slow
def test_adapters_beside_a_pipeline(ranks: Pools) -> None:
    def recipe(parallel: ParallelConfig) -> Recipe:
        return replace(tiny_recipe(MODEL, parallel), lora=LoraConfig(rank=3, alpha=6.0))

    expected = ranks(1).run(run_trial, recipe(ParallelConfig()))[0]
    assert_same_training(ranks(2).run(run_trial, recipe(ParallelConfig(pipeline=2)))[0], expected)
