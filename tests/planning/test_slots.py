"""Slots and stages: who owns what, and the messages of what cannot be."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_deepstack.config.choices import GridRule, Sampler, Variant
from megatron_deepstack.config.schema import ParallelConfig, Recipe, StackConfig
from megatron_deepstack.errors import LayoutError, SlotError
from megatron_deepstack.planning.check import find_plan_problems
from megatron_deepstack.planning.exchange.image_plan import image_plan
from megatron_deepstack.planning.exchange.rows import image_rows
from megatron_deepstack.planning.exchange.vit_stacks import plan_vit_stacks
from megatron_deepstack.planning.slots import EMBEDDING, chunk_slots, decoder_slots, owner, stack_slots, stage_chunks
from megatron_deepstack.planning.views import candidate_grids, num_views
from megatron_deepstack.testing.tiny import tiny_model


def test_published_slots() -> None:
    assert stack_slots(StackConfig(), 32) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("stacks", "words"),
    [
        (StackConfig(start=6), ("stack 2 has slot 8", "8 layers (0 to 7)")),
        (StackConfig(slots=(1, 2, 3)), ("3 slots [1, 2, 3] for 4 stacks",)),
        (StackConfig(slots=(1, 2, 3, -1)), ("stack 3 has slot -1",)),
    ],
    ids=["outside", "too few", "negative"],
)
def test_slots_that_cannot_be(stacks: StackConfig, words: tuple[str, ...]) -> None:
    """A slot outside the model and more stacks than slots are errors with the numbers in them."""
    with pytest.raises(SlotError) as caught:
        stack_slots(stacks, 8)
    for word in words:
        assert word in str(caught.value)


def test_interleaved_chunks_follow_megatron() -> None:
    """Chunk v * pp + p lives on stage p; the embedding is on the first, the head on the last."""
    chunks = stage_chunks(8, ParallelConfig(pipeline=2, virtual_pipeline=2))
    assert [(c.pp, c.vpp, c.first, c.stop) for c in chunks] == [(0, 0, 0, 2), (1, 0, 2, 4), (0, 1, 4, 6), (1, 1, 6, 8)]
    assert [c.has_embedding for c in chunks] == [True, False, False, False]
    assert [c.has_head for c in chunks] == [False, False, False, True]


def test_every_layer_has_one_owner() -> None:
    chunks = stage_chunks(8, ParallelConfig(pipeline=4, layers_per_stage=(0, 3, 3, 2)))
    assert [owner(layer, chunks) for layer in range(8)] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert owner(EMBEDDING, chunks) == 0
    assert [chunk_slots(c, (7, 0, 3, 7)) for c in chunks] == [(), (0,), (3,), (7,)]
    assert owner(8, chunks) == 3, "the output of the last layer belongs to the head's chunk"
    with pytest.raises(SlotError, match="slot 9"):
        owner(9, chunks)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (ParallelConfig(pipeline=3), "8 decoder layers do not split evenly over 3 chunks"),
        (ParallelConfig(pipeline=2, layers_per_stage=(3, 4)), "sum to 7"),
        (ParallelConfig(pipeline=2, layers_per_stage=(8,)), "must be 2 counts"),
    ],
    ids=["uneven", "wrong sum", "wrong number"],
)
def test_layers_that_do_not_fit(parallel: ParallelConfig, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        stage_chunks(8, parallel)


def test_stacks_behind_the_feature_are_reported() -> None:
    """DeepStack-V from layer 1 of 4, feature entering layer 3: the fourth stack finds no place, as published."""
    model = tiny_model(variant=Variant.DEEPSTACK_V, stacks=StackConfig(start=1))
    plan = plan_vit_stacks(model)
    assert (plan.slots, plan.last_unprocessed, plan.dropped) == ((1, 2), True, (2, 3))
    assert decoder_slots(model) == ()
    with pytest.raises(SlotError, match="must rise and begin within 0 to 2"):
        plan_vit_stacks(tiny_model(variant=Variant.DEEPSTACK_V, stacks=StackConfig(start=5)))
    with pytest.raises(SlotError, match=r"2 slots \[0, 1\] for DeepStack-V's 4 stacks"):
        plan_vit_stacks(tiny_model(variant=Variant.DEEPSTACK_V, stacks=StackConfig(slots=(0, 1))))


def test_the_first_stacks_alone() -> None:
    """Their rows are those of all stacks; a crop that no stack reads is not encoded."""
    whole = image_rows(tiny_model(), (2, 2))
    model = tiny_model(stacks=StackConfig(num_stacks=2, slots=(3, 1)))
    rows = image_rows(model, (2, 2))
    kept = whole.stack < 2
    np.testing.assert_array_equal(rows.token, whole.token[kept])
    np.testing.assert_array_equal(rows.view, whole.view[kept])
    assert decoder_slots(model) == (3, 1)
    by_crop = tiny_model(stacks=StackConfig(sampler=Sampler.GRID, num_stacks=1))
    assert image_plan(by_crop, (2, 2), 10**6).units == ((0,), (1,))


@pytest.mark.parametrize(
    ("variant", "number", "text"),
    [
        (Variant.DEEPSTACK_L, 5, "5 stacks, but an image has at most 4"),
        (Variant.DEEPSTACK_HD, 5, "5 stacks, but an image has at most 4"),
        (Variant.DEEPSTACK_V, 2, "2 says nothing about deepstack_v"),
        (Variant.IN_SEQUENCE, 2, "2 says nothing about in_sequence"),
    ],
)
def test_a_number_of_stacks_that_cannot_be(variant: Variant, number: int, text: str) -> None:
    stacks = StackConfig(
        num_stacks=number, grid=GridRule.FIXED_2X2, start=0, interval=0 if variant.traits.stacks_in_decoder else 1
    )
    problems = find_plan_problems(Recipe(model=tiny_model(variant=variant, stacks=stacks)))
    assert [one for one in problems if "model.stacks.num_stacks" in one.paths and text in one.text]


@pytest.mark.parametrize("num_crops", [2, 4, 9])
def test_every_view_of_deepstack_hd_has_four_crops(num_crops: int) -> None:
    """However many crops a grid may have."""
    model = tiny_model(variant=Variant.DEEPSTACK_HD, stacks=StackConfig(num_crops=num_crops))
    assert decoder_slots(model) == (1, 2, 3, 4)
    for grid in candidate_grids(num_crops):
        rows = image_rows(model, grid)
        assert set(rows.stack.tolist()) == {-1, 0, 1, 2, 3}
        assert set(rows.view.tolist()) == {-1, *range(num_views(model.variant, grid))}
