"""Slots, stages and ranks: refused before anything starts, with the numbers and a way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_deepstack.config.choices import Batching, EncoderPlacement, Part, Variant
from megatron_deepstack.config.schema import (
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    StackConfig,
    TrainConfig,
    VisionConfig,
)
from megatron_deepstack.errors import ConfigError, LayoutError, SlotError
from megatron_deepstack.planning.check import check_plan, check_world, load_checked_recipe, model_ranks


def recipe(num_layers: int = 8, stacks: StackConfig | None = None, **parallel: object) -> Recipe:
    model = ModelConfig(language=LanguageConfig(num_layers=num_layers), stacks=stacks or StackConfig())
    return Recipe(model=model, parallel=ParallelConfig(**parallel))


@pytest.mark.parametrize(
    "slots", [(0, 2, 4, 6), (4, 5, 6, 7), (7, 7, 7, 7), (3, 0, 3, 1)], ids=["spread", "last stage", "same", "any order"]
)
def test_slots_inside_the_model(slots):
    check_plan(recipe(stacks=StackConfig(slots=slots), pipeline=4))


REFUSED = {
    "slot behind the last layer": (recipe(stacks=StackConfig(start=5)), SlotError, "stack 3 has slot 8", "8 layers"),
    "slot before the first": (
        recipe(stacks=StackConfig(slots=(-1, 0, 1, 2))),
        SlotError,
        "stack 0 has slot -1",
        "0 to 7",
    ),
    "more stacks than slots": (recipe(stacks=StackConfig(slots=(1, 2))), SlotError, "2 slots [1, 2] for 4 stacks", "4"),
    "uneven stages": (recipe(pipeline=3), LayoutError, "8 decoder layers do not split evenly over 3", "[2, 3, 3]"),
    "wrong sum": (recipe(pipeline=2, layers_per_stage=(4, 5)), LayoutError, "sum to 9", "8 layers"),
    "wrong count": (recipe(pipeline=2, layers_per_stage=(8,)), LayoutError, "they are 1", "2 counts"),
    "a stage with nothing to train": (
        recipe(pipeline=3, layers_per_stage=(4, 0, 4)),
        LayoutError,
        "parallel.layers_per_stage: stages [1] hold no layer, embedding or head",
        "give them a layer, or use parallel.pipeline=2",
    ),
    "chunks with nothing to train": (
        recipe(pipeline=3, virtual_pipeline=2, layers_per_stage=(4, 0, 0, 0, 0, 4)),
        LayoutError,
        "stages [1] hold no layer, embedding or head",
        "parallel.pipeline=2",
    ),
    "inline behind the first stage": (
        recipe(pipeline=4, encoder_placement=EncoderPlacement.INLINE, stacks=StackConfig(slots=(0, 1, 2, 7))),
        LayoutError,
        "slots [2, 7] lie behind it",
        "parallel.encoder_placement=spread",
    ),
    "DeepStack-V behind its feature": (
        Recipe(
            model=ModelConfig(
                variant=Variant.DEEPSTACK_V, stacks=StackConfig(start=24), vision=VisionConfig(num_layers=24)
            )
        ),
        SlotError,
        "must rise and begin within 0 to 23",
        "lower model.stacks.start",
    ),
}


@pytest.mark.parametrize(("bad", "kind", "words", "way_out"), REFUSED.values(), ids=REFUSED)
def test_refused(bad, kind, words, way_out):
    with pytest.raises(kind) as caught:
        check_plan(bad)
    assert words in str(caught.value)
    assert way_out in str(caught.value)


def test_inline_is_fine_where_all_slots_are_on_the_first_stage():
    check_plan(recipe(pipeline=2, encoder_placement=EncoderPlacement.INLINE, stacks=StackConfig(slots=(0, 1, 2, 3))))


@pytest.mark.parametrize("layers", [(0, 4, 4), (4, 4, 0), (0, 8, 0)])
def test_a_stage_with_the_embedding_or_the_head_needs_no_layer(layers: tuple[int, ...]):
    check_plan(recipe(pipeline=3, layers_per_stage=layers))


def test_a_stage_needs_no_layer_where_another_chunk_has_one_or_the_decoder_is_frozen():
    check_plan(recipe(pipeline=3, virtual_pipeline=2, layers_per_stage=(1, 0, 2, 2, 2, 1)))
    frozen = TrainConfig(trainable=(Part.VISION, Part.PROJECTOR))
    check_plan(replace(recipe(pipeline=3, layers_per_stage=(4, 0, 4)), train=frozen))


def test_slots_and_stages_are_reported_together_with_the_file(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text("parallel: {pipeline: 5}\nmodel: {stacks: {start: 30}}\ntrain: {stepz: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load_checked_recipe(file)
    starts = ["train.stepz", "model.stacks: stack 2", "model.stacks: stack 3", "parallel.pipeline: 32 decoder layers"]
    for start, problem in zip(starts, caught.value.problems, strict=True):
        assert problem.startswith(start)


@pytest.mark.parametrize(
    ("overrides", "starts"),
    [
        ("parallel.pipeline=0 lora.rank=4", ["parallel.pipeline: found 0"]),
        ("parallel.pipeline=0 parallel.encoder_placement=inline", ["parallel.pipeline: found 0"]),
        ("parallel.recompute=full parallel.recompute_num_layers=0", ["parallel.recompute_num_layers: found 0"]),
        ("parallel.tensor=0 train.precision=fp8", ["parallel.tensor: found 0"]),
        ("parallel.context=0 train.precision=fp8", ["parallel.context: found 0"]),
        ("model.language.num_heads=0 train.precision=fp8", ["model.language.num_heads: found 0"]),
        ("parallel.pipeline=0 train.stepz=1 optimizer.lr=-1", ["train.stepz", "parallel.pipeline", "optimizer.lr"]),
        ("optimizer.lr=-1 model.stacks.slots=[0,1,2,9]", ["optimizer.lr: found -1", "model.stacks: stack 3"]),
    ],
)
def test_numbers_out_of_range_are_reported_and_not_planned_with(overrides: str, starts: list[str]):
    with pytest.raises(ConfigError) as caught:
        load_checked_recipe("demo", overrides.split())
    for start, problem in zip(starts, caught.value.problems, strict=True):
        assert problem.startswith(start)


def test_a_plan_is_refused_for_numbers_out_of_range():
    with pytest.raises(ConfigError, match="pipeline: found 0, expected a number above 0"):
        check_plan(recipe(pipeline=0))


def test_world_must_be_whole_replicas():
    wanted = replace(recipe(tensor=2, pipeline=2), train=TrainConfig(global_batch_size=12))
    check_world(wanted, 4)
    check_world(wanted, 8)
    with pytest.raises(
        LayoutError, match=r"takes 4 ranks \(tensor 2 x pipeline 2 x context 1\) and there are 6"
    ) as caught:
        check_world(wanted, 6)
    assert "start 4 ranks, or use parallel.tensor=1 parallel.pipeline=2 parallel.context=1" in str(caught.value)


@pytest.mark.parametrize("world_size", [0, -4, 3])
def test_too_few_ranks(world_size):
    with pytest.raises(LayoutError, match="start 4 ranks"):
        check_world(recipe(tensor=2, pipeline=2), world_size)


def test_batch_must_divide_over_replicas():
    odd = replace(recipe(), train=TrainConfig(global_batch_size=10, micro_batch_size=2))
    check_world(odd, 5)
    with pytest.raises(LayoutError, match=r"10 samples do not divide into 4 .* use 8 or 12"):
        check_world(odd, 2)


def test_interleaving_takes_rounds_of_stages():
    interleaved = replace(recipe(pipeline=2, virtual_pipeline=2), train=TrainConfig(global_batch_size=5))
    with pytest.raises(LayoutError, match=r"5 samples do not divide into 2 .*take turns.* use 4 or 6"):
        check_world(interleaved, 2)


def test_ranks_of_a_replica():
    assert model_ranks(ParallelConfig(tensor=2, pipeline=3, context=4)) == 24


def test_packs_divide_over_any_number_of_replicas() -> None:
    packed = replace(recipe(), train=TrainConfig(global_batch_size=10, batching=Batching.PACKED))
    check_world(packed, 4)
    with pytest.raises(LayoutError, match=r"10 samples for 12 replicas, some of which .* use 12 or more, or fewer"):
        check_world(packed, 12)
