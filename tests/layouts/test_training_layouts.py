"""Losses, every gradient, gradient norms and the parameters after three steps: each layout against one rank.

The samples have no, one and two images on mixed grids, anywhere in the text, mixed in micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from megatron_deepstack.config.choices import (
    Batching,
    EncoderPlacement,
    Part,
    Precision,
    Recompute,
    RopeType,
    Sampler,
    Variant,
)
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, ParallelConfig, RopeScalingConfig, StackConfig
from megatron_deepstack.testing.compare import worst
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_model, tiny_recipe
from megatron_deepstack.testing.trial import Trial, run_trial

Pools = Callable[[int], RankPool]
INLINE = EncoderPlacement.INLINE

# Measured worst over all rows, float32: loss 4e-7, gradients 7e-6, parameters 4e-5 (Adam divides small by small).
LOSS_TOLERANCE = 3e-6
GRADIENT_TOLERANCE = 1e-4
PARAMETER_TOLERANCE = 5e-4

LAYOUTS = [
    ("pp2", 2, 1, ParallelConfig(pipeline=2)),
    ("pp2-batch2", 2, 2, ParallelConfig(pipeline=2)),
    ("pp2-vpp2", 2, 1, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    ("pp2-uneven", 2, 1, ParallelConfig(pipeline=2, layers_per_stage=(3, 5))),
    ("pp2-vpp2-empty", 2, 1, ParallelConfig(pipeline=2, virtual_pipeline=2, layers_per_stage=(4, 0, 0, 4))),
    ("tp2", 2, 2, ParallelConfig(tensor=2)),
    ("tp2-sp", 2, 1, ParallelConfig(tensor=2, sequence_parallel=True)),
    ("tp2-inline", 2, 1, ParallelConfig(tensor=2, encoder_placement=INLINE)),
    ("tp2-sp-inline", 2, 1, ParallelConfig(tensor=2, sequence_parallel=True, encoder_placement=INLINE)),
    ("cp2", 2, 1, ParallelConfig(context=2)),
    ("dp2", 2, 1, ParallelConfig()),
    ("dp2-zero", 2, 2, ParallelConfig(distributed_optimizer=True)),
    ("pp4", 4, 1, ParallelConfig(pipeline=4)),
    ("tp2-pp2-sp", 4, 1, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)),
    ("pp2-dp2-zero", 4, 1, ParallelConfig(pipeline=2, distributed_optimizer=True)),
    ("pp2-cp2", 4, 1, ParallelConfig(pipeline=2, context=2)),
    ("tp2-cp2", 4, 1, ParallelConfig(tensor=2, context=2)),
    ("tp2-cp2-sp", 4, 1, ParallelConfig(tensor=2, context=2, sequence_parallel=True)),
    ("pp2-recompute", 2, 1, ParallelConfig(pipeline=2, recompute=Recompute.FULL, recompute_num_layers=2)),
]


def rows(table: list[tuple[Any, ...]], quick: set[str]) -> list[Any]:
    """The rows of a table as parameters by their ids; `make test` runs the quick ones."""
    assert quick <= {row[0] for row in table}
    return [pytest.param(*row[1:], id=row[0], marks=[pytest.mark.slow] * (row[0] not in quick)) for row in table]


@lru_cache(maxsize=32)
def _one_rank(pools: Pools, model: ModelConfig, trainable: tuple[Part, ...]) -> Trial:
    recipe = tiny_recipe(model, trainable=trainable)
    trial: Trial = pools(1).run(run_trial, recipe)[0]
    return trial


def assert_same_training(actual: Trial, expected: Trial) -> None:
    """Losses, gradients of the first step and parameters after three steps are those of the other run."""
    assert_same_losses(actual, expected)
    error, name = worst(actual.first_gradients, expected.first_gradients)
    assert error <= GRADIENT_TOLERANCE, f"gradient of {name}"
    assert_same_parameters(actual, expected)


def assert_same_parameters(actual: Trial, expected: Trial) -> None:
    """After three steps."""
    error, name = worst(actual.parameters, expected.parameters)
    assert error <= PARAMETER_TOLERANCE, f"parameter {name} after three steps"


def assert_same_losses(actual: Trial, expected: Trial) -> None:
    """Those of experts as well, where there are any."""
    assert actual.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert actual.balance_losses == pytest.approx(expected.balance_losses, rel=LOSS_TOLERANCE)
    assert actual.busiest_experts == pytest.approx(expected.busiest_experts)


def _compare(
    pools: Pools,
    num_ranks: int,
    batch: int,
    parallel: ParallelConfig,
    model: ModelConfig,
    trainable: tuple[Part, ...] = tuple(Part),
) -> None:
    expected = _one_rank(pools, model, trainable)
    recipe = tiny_recipe(model, parallel, trainable=trainable, micro_batch_size=batch)
    actual: Trial = pools(num_ranks).run(run_trial, recipe)[0]
    assert_same_losses(actual, expected)
    assert actual.gradient_norms == pytest.approx(expected.gradient_norms, rel=GRADIENT_TOLERANCE)
    if not parallel.distributed_optimizer:
        error, name = worst(actual.first_gradients, expected.first_gradients)
        assert error <= GRADIENT_TOLERANCE, f"gradient of {name}"
    assert_same_parameters(actual, expected)


@pytest.mark.parametrize(
    ("num_ranks", "batch", "parallel"),
    rows(LAYOUTS, {"pp2-vpp2", "tp2-sp", "cp2", "dp2-zero", "pp4", "tp2-cp2-sp", "pp2-recompute"}),
)
def test_layout_equals_one_rank(ranks: Pools, num_ranks: int, batch: int, parallel: ParallelConfig) -> None:
    """DeepStack-L, stacks spread over the whole depth, all parts trained."""
    _compare(ranks, num_ranks, batch, parallel, tiny_model())


GROUPED = LanguageConfig(
    vocab_size=61,
    hidden_size=32,
    ffn_hidden_size=48,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    qkv_bias=True,
    qk_norm=True,
    tied_embeddings=True,
    rope_scaling=RopeScalingConfig(rope_type=RopeType.LLAMA3, factor=8.0, original_max_position_embeddings=16),
)
MODELS = [
    ("all-on-last-stage", tiny_model(stacks=StackConfig(slots=(7, 7, 6, 7)))),
    ("one-slot-per-stage", tiny_model(stacks=StackConfig(slots=(1, 3, 5, 7)))),
    ("published-start", tiny_model(stacks=StackConfig(num_stacks=3))),
    ("sequential", tiny_model(stacks=StackConfig(sampler=Sampler.SEQUENTIAL_1D, start=0, interval=2))),
    ("grid-sampler", tiny_model(stacks=StackConfig(sampler=Sampler.GRID, num_stacks=3, start=2))),
    ("vit-stacks", tiny_model(variant=Variant.DEEPSTACK_V, stacks=StackConfig(start=0))),
    ("any-resolution", tiny_model(variant=Variant.DEEPSTACK_HD, stacks=StackConfig(start=1))),
    ("no-stacks", tiny_model(variant=Variant.LLAVA)),
    ("no-stacks-any-resolution", tiny_model(variant=Variant.LLAVA_ANYRES)),
    ("all-in-sequence", tiny_model(variant=Variant.IN_SEQUENCE)),
    ("grouped-tied", tiny_model(language=GROUPED)),
]


@pytest.mark.parametrize("model", rows(MODELS, {"published-start", "vit-stacks", "any-resolution", "grouped-tied"}))
def test_model_on_four_stages(ranks: Pools, model: ModelConfig) -> None:
    """Every member of the family with a pipeline of four."""
    _compare(ranks, 4, 1, ParallelConfig(pipeline=4), model)


@pytest.mark.parametrize(
    "sequence_parallel",
    [pytest.param(False, id="tp2-cp2"), pytest.param(True, id="tp2-cp2-sp")],
)
@pytest.mark.slow
def test_any_resolution_in_quarters(ranks: Pools, sequence_parallel: bool) -> None:
    """Rows and newlines of an any-resolution context, whose positions are dealt to zigzag chunks and then to shards."""
    parallel = ParallelConfig(tensor=2, context=2, sequence_parallel=sequence_parallel)
    _compare(ranks, 4, 1, parallel, dict(MODELS)["any-resolution"])


@pytest.mark.parametrize(
    "trainable",
    [(Part.PROJECTOR,), (Part.PROJECTOR, Part.LANGUAGE), (Part.LANGUAGE,), (Part.VISION, Part.PROJECTOR)],
    ids=["projector", "projector-language", "language", "vision-projector"],
)
def test_frozen_parts(ranks: Pools, trainable: tuple[Part, ...]) -> None:
    """The published stages train parts; frozen ones must not hang, move or gain gradients."""
    _compare(ranks, 2, 1, ParallelConfig(pipeline=2), tiny_model(), trainable)


def test_bf16_is_near_float32(ranks: Pools) -> None:
    """bf16 parameters with float32 gradients: within bf16's own rounding (2^-8) of the float32 losses."""
    recipe = tiny_recipe(parallel=ParallelConfig(pipeline=2), precision=Precision.BF16)
    low: Trial = ranks(2).run(run_trial, recipe)[0]
    high = _one_rank(ranks, tiny_model(), tuple(Part))
    assert low.losses == pytest.approx(high.losses, rel=2**-6)


def test_truncated_images(ranks: Pools) -> None:
    """A sequence limit that cuts through images: rows beyond it are neither encoded nor routed, in any layout."""
    recipe = tiny_recipe()
    recipe = replace(recipe, train=replace(recipe.train, seq_length=17, truncate=True))
    expected: Trial = ranks(1).run(run_trial, recipe, 8, 0, True)[0]
    cut = replace(recipe, parallel=ParallelConfig(pipeline=2))
    actual: Trial = ranks(2).run(run_trial, cut, 8, 0, True)[0]
    assert actual.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    error, name = worst(actual.first_gradients, expected.first_gradients)
    assert error <= GRADIENT_TOLERANCE, name


PACKED_LAYOUTS = [
    ("one", 1, ParallelConfig()),
    ("pp2", 2, ParallelConfig(pipeline=2)),
    ("pp2-vpp2", 2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    ("tp2-sp", 2, ParallelConfig(tensor=2, sequence_parallel=True)),
    ("dp2", 2, ParallelConfig()),
    ("pp2-recompute", 2, ParallelConfig(pipeline=2, recompute=Recompute.FULL, recompute_num_layers=2)),
    ("cp2", 2, ParallelConfig(context=2)),
]
CONTEXT_LAYOUTS = [
    ("cp2", 2, ParallelConfig(context=2)),
    ("cp2-tp2", 4, ParallelConfig(context=2, tensor=2)),
    ("cp2-tp2-sp", 4, ParallelConfig(context=2, tensor=2, sequence_parallel=True)),
    ("cp2-pp2-vpp2", 4, ParallelConfig(context=2, pipeline=2, virtual_pipeline=2)),
]


@pytest.mark.parametrize(
    ("num_ranks", "parallel"), [row[1:] for row in PACKED_LAYOUTS], ids=[row[0] for row in PACKED_LAYOUTS]
)
def test_packs_equal_padded_rows(ranks: Pools, num_ranks: int, parallel: ParallelConfig) -> None:
    """Samples that share rows neither see each other nor shift each other's positions: the unpacked one-rank run."""
    _compare_packs(ranks, num_ranks, parallel, tiny_model(), 64)


def _compare_packs(ranks: Pools, num_ranks: int, parallel: ParallelConfig, model: ModelConfig, seq_length: int) -> None:
    expected = _one_rank(ranks, model, tuple(Part))
    recipe = tiny_recipe(model, parallel=parallel)
    recipe = replace(recipe, train=replace(recipe.train, batching=Batching.PACKED, seq_length=seq_length))
    actual: Trial = ranks(num_ranks).run(run_trial, recipe)[0]
    assert_same_training(actual, expected)


@pytest.mark.parametrize(("num_ranks", "parallel"), rows(CONTEXT_LAYOUTS, {"cp2"}))
def test_packs_of_any_resolution_over_context_ranks(ranks: Pools, num_ranks: int, parallel: ParallelConfig) -> None:
    """Each sample is divided by itself, and the rows of its stacks follow; DeepStack-HD, a slot on each stage."""
    model = tiny_model(variant=Variant.DEEPSTACK_HD, stacks=StackConfig(slots=(1, 3, 5, 7)))
    _compare_packs(ranks, num_ranks, parallel, model, 256)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "parallel"), [row[1:] for row in CONTEXT_LAYOUTS[1:]], ids=[row[0] for row in CONTEXT_LAYOUTS[1:]]
)
def test_packs_over_context_ranks(ranks: Pools, num_ranks: int, parallel: ParallelConfig) -> None:
    """The same for DeepStack-L with more layouts."""
    _compare_packs(ranks, num_ranks, parallel, tiny_model(), 64)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("batching", "micro_batch_size"), [(Batching.PACKED, 1), (Batching.PADDED, 2)], ids=["packed", "padded"]
)
def test_the_number_of_replicas_makes_no_difference(
    ranks: Pools, num_ranks: int, batching: Batching, micro_batch_size: int
) -> None:
    """Samples are dealt anew for each number of replicas; the step's loss and gradient stay what they are."""
    recipe = tiny_recipe(global_batch_size=8, micro_batch_size=micro_batch_size)
    recipe = replace(recipe, train=replace(recipe.train, batching=batching))
    expected: Trial = ranks(1).run(run_trial, recipe, 16)[0]
    actual: Trial = ranks(num_ranks).run(run_trial, recipe, 16)[0]
    assert actual.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    error, name = worst(actual.first_gradients, expected.first_gradients)
    assert error <= GRADIENT_TOLERANCE, f"gradient of {name}"
