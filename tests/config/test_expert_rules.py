"""Rules for decoders with experts, and their words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_deepstack.config.check import find_problems
from megatron_deepstack.config.choices import LoraTarget, Precision, Variant
from megatron_deepstack.config.schema import LoraConfig, ParallelConfig, Recipe
from megatron_deepstack.config.sizes import expert_layers
from megatron_deepstack.errors import LayoutError
from megatron_deepstack.planning.check import check_world, find_plan_problems
from megatron_deepstack.testing.tiny import tiny_qwen3_vl, tiny_qwen3_vl_moe, tiny_recipe

SP = {"tensor": 2, "sequence_parallel": True}


def _words(recipe: Recipe) -> str:
    return "; ".join(map(str, find_problems(recipe) or find_plan_problems(recipe)))


@pytest.mark.parametrize(
    ("language", "parallel", "words"),
    [
        ({"num_active_experts": 7}, {}, "num_active_experts: 7 experts for each token, of 6"),
        ({"dense_layers": (8,)}, {}, r"dense_layers: found \[8\], expected layers from 0 to 7"),
        ({}, {"expert": 4}, "parallel.expert: 4 ranks do not divide the 6 experts; use 3"),
        ({}, {"tensor": 2}, "parallel.sequence_parallel: .* set parallel.sequence_parallel=true"),
        ({"dense_layers": (0, 1)}, {"pipeline": 4}, r"stages \[0\] hold no layer with experts"),
        ({"expert_interval": 9}, {"expert": 2}, "no layer of the decoder has any; set parallel.expert=1"),
        ({"family": "qwen3_vl"}, {}, "model.variant: the decoder of qwen3_vl_moe is one with experts"),
    ],
    ids=["too-many", "outside", "indivisible", "no-sequence-parallelism", "idle-stage", "none", "family"],
)
def test_what_cannot_run_is_named(language: dict[str, Any], parallel: dict[str, Any], words: str) -> None:
    with_it = tiny_recipe(tiny_qwen3_vl_moe(**language), ParallelConfig(**parallel))
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(_words(with_it))


@pytest.mark.parametrize("parallel", [{}, {"expert": 3}, {**SP, "expert": 2}, {"pipeline": 4, "expert": 6}], ids=str)
def test_what_can_run_has_no_problem(parallel: dict[str, Any]) -> None:
    assert not _words(tiny_recipe(tiny_qwen3_vl_moe(dense_layers=(0,), vocab_size=62), ParallelConfig(**parallel)))


def test_decoders_without_experts_have_none() -> None:
    dense = tiny_qwen3_vl()
    assert "and a decoder of the family qwen3_vl has none" in _words(
        tiny_recipe(replace(dense, language=replace(dense.language, num_experts=4)))
    )
    assert "set parallel.expert=1" in _words(tiny_recipe(dense, ParallelConfig(expert=2)))
    assert "set both to qwen3_vl_moe" in _words(tiny_recipe(replace(dense, variant=Variant.QWEN3_VL_MOE)))


def test_adapters_and_fp8_say_what_to_do() -> None:
    recipe = tiny_recipe(tiny_qwen3_vl_moe())
    assert "use lora.targets=[qkv, attention_output]" in _words(replace(recipe, lora=LoraConfig(rank=4)))
    attention = LoraConfig(rank=4, targets=(LoraTarget.QKV, LoraTarget.ATTENTION_OUTPUT))
    assert not _words(replace(recipe, lora=attention))
    assert "use bf16" in _words(replace(recipe, train=replace(recipe.train, precision=Precision.FP8)))


def test_the_ranks_of_a_stage_are_shared_evenly() -> None:
    recipe = tiny_recipe(tiny_qwen3_vl_moe(), ParallelConfig(pipeline=2, expert=3), global_batch_size=4)
    with pytest.raises(LayoutError, match=r"3 ranks share experts, and a stage has 4 .* use parallel.expert=1"):
        check_world(recipe, 8)


@pytest.mark.parametrize(
    ("interval", "dense", "layers"),
    [
        (1, (), tuple(range(8))),
        (2, (), (1, 3, 5, 7)),
        (2, (3,), (1, 5, 7)),
        (3, (0,), (2, 5)),
        (1, (0, 7), (1, 2, 3, 4, 5, 6)),
    ],
    ids=str,
)
def test_layers_with_experts(interval: int, dense: tuple[int, ...], layers: tuple[int, ...]) -> None:
    assert expert_layers(tiny_qwen3_vl_moe(expert_interval=interval, dense_layers=dense).language) == layers
