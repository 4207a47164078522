"""Parameters are exact, and memory is what ranks allocate: tiny models, one step under a counter of live bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_deepstack.config.architectures import LANGUAGE, VISION
from megatron_deepstack.config.choices import Batching, Part, Recompute, RecomputeMethod, Variant
from megatron_deepstack.config.schema import (
    LanguageConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    StackConfig,
    VisionConfig,
)
from megatron_deepstack.planning.budget.cost import decoder_flops
from megatron_deepstack.planning.budget.footprint import active_parameters, part_parameters
from megatron_deepstack.planning.budget.load import Shapes, step_load
from megatron_deepstack.planning.budget.memory import rank_memory
from megatron_deepstack.planning.budget.parameters import encoder_parameters, stage_parameters
from megatron_deepstack.planning.check import model_ranks
from megatron_deepstack.planning.views import num_views
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import (
    tiny_model,
    tiny_qwen3_vl_moe,
    tiny_recipe,
    tiny_samples,
    tiny_share,
    unit_pixels,
)

Pools = Callable[[int], RankPool]
NUM_SAMPLES = 16
NAMED = ("qwen3_vl_30b_a3b", "qwen3_vl_235b_a22b")

# Measured over the layouts below: -4.5 % to +0.5 %. Not in the table: full uniform recomputation on a first stage
# (-7 %), and context parallelism, whose attention on a CPU gathers keys and values and is not the one of GPUs.
TOLERANCE = 0.05


def built(rank: int, recipe: Recipe) -> tuple[Any, Any]:
    """The rank's model and groups."""
    from megatron_deepstack.model.build import build_model, fill_model, freeze
    from megatron_deepstack.model.init import random_source
    from megatron_deepstack.testing.ranks import groups_for

    groups = groups_for(recipe.parallel)
    model = build_model(recipe.model, recipe.parallel, recipe.train.precision, groups, recipe.lora)
    fill_model(model, random_source(recipe.model, 1), groups.decoder.tp)
    freeze(model, recipe.train.trainable)
    return model, groups


def counted(rank: int, recipe: Recipe) -> tuple[int, list[int], list[int]]:
    """The rank's stage, and all and learned parameters of its decoder and encoder."""
    model, groups = built(rank, recipe)
    parts = [[p for chunk in model.chunks for p in chunk.parameters()], list(model.encoder.parameters())]
    everything = [sum(p.numel() for p in part) for part in parts]
    return groups.place.pp, everything, [sum(p.numel() for p in part if p.requires_grad) for part in parts]


def allocated(rank: int, recipe: Recipe) -> tuple[int, int]:
    """The rank's stage, and the bytes of weights, gradients, states and the fullest moment of a second step."""
    import torch

    from megatron_deepstack.planning.batch.step_plan import plan_step
    from megatron_deepstack.step.clock import StepClock
    from megatron_deepstack.step.engine import build_engine
    from megatron_deepstack.step.train_step import forward_backward
    from megatron_deepstack.testing.live_bytes import LiveBytes
    from megatron_deepstack.training.optim.optimizer import Optimizer

    model, groups = built(rank, recipe)
    train = recipe.train
    engine = build_engine(model, recipe.model, recipe.parallel, groups)
    optimizer = Optimizer(engine, recipe.optimizer, train.precision, train.steps)
    samples = tiny_samples(recipe.model, NUM_SAMPLES)
    planned, images = tiny_share(samples, recipe, groups.place.dp, groups.axes.dp)
    packed = train.batching is Batching.PACKED
    plan = plan_step(recipe.model, recipe.parallel, planned, groups.replica_rank, packed=packed)
    pixels = unit_pixels(recipe.model, images, plan)
    for step in range(2):
        with LiveBytes(lambda tensor: True) as live:
            forward_backward(engine, plan, pixels, StepClock())
        optimizer.step(step)
    states = [state for one in optimizer.chained.chained_optimizers for state in one.optimizer.state.values()]
    held = sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor))
    held += sum(p.nbytes for part in (*model.chunks, model.encoder) for p in part.parameters())
    held += sum(buffer.grad_data.nbytes for ddp in engine.wrapped for buffer in ddp.buffers)
    return groups.place.pp, held + live.peak


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
)
MODELS: dict[str, ModelConfig] = {
    **{
        str(variant): tiny_model(variant=variant, stacks=StackConfig(start=0 if variant.stacks_in_vit else 1))
        for variant in Variant
        if variant.traits.whole_model is None  # of the others nothing is predicted
    },
    "grouped-tied": tiny_model(language=GROUPED),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_exact(ranks: Pools, name: str) -> None:
    recipe = tiny_recipe(MODELS[name])
    ((_, everything, learned),) = ranks(1).run(counted, recipe)
    decoder, encoder = stage_parameters(recipe, 0), encoder_parameters(recipe)
    assert everything == [decoder.total, encoder.total]
    assert learned == [decoder.learned, encoder.learned]


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(tensor=2), ParallelConfig(pipeline=2, layers_per_stage=(3, 5))], ids=["tp2", "pp2"]
)
@pytest.mark.parametrize("lora", [0, 3], ids=["whole", "lora"])
def test_parameters_of_each_rank_are_exact(ranks: Pools, parallel: ParallelConfig, lora: int) -> None:
    recipe = replace(tiny_recipe(MODELS["grouped-tied"], parallel), lora=LoraConfig(rank=lora))
    for stage, everything, learned in ranks(2).run(counted, recipe):
        decoder, encoder = stage_parameters(recipe, stage), encoder_parameters(recipe)
        assert everything == [decoder.total, encoder.total]
        assert learned == [decoder.learned, encoder.learned]


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        (1, ParallelConfig()),
        (2, ParallelConfig(expert=2)),
        (2, ParallelConfig(tensor=2, sequence_parallel=True, expert=2)),
        (2, ParallelConfig(pipeline=2)),
    ],
    ids=["one", "ep2", "tp2-ep2", "pp2"],
)
def test_parameters_of_experts_are_exact(ranks: Pools, num_ranks: int, parallel: ParallelConfig) -> None:
    """Whole experts on the ranks that hold them, the router on all; layers without experts among the others."""
    model = tiny_qwen3_vl_moe(dense_layers=(0, 5), num_experts=4)
    recipe = tiny_recipe(model, parallel)
    for stage, (everything, _), (learned, _) in ranks(num_ranks).run(counted, recipe):
        decoder = stage_parameters(recipe, stage)
        assert (everything, learned) == (decoder.total, decoder.learned)
        layers = sum(stage == (layer * parallel.pipeline) // 8 for layer in (1, 2, 3, 4, 6, 7))
        assert decoder.experts == decoder.experts_learned == layers * 4 // parallel.expert * 3 * 32 * 20


def test_active_parameters_are_those_that_a_token_passes() -> None:
    sizes = {name: ModelConfig(vision=VISION[name], language=LANGUAGE[name]) for name in NAMED}
    total = {name: part_parameters(model)[Part.LANGUAGE] / 1e9 for name, model in sizes.items()}
    idle = {name: (sum(part_parameters(m).values()) - active_parameters(m)) / 1e9 for name, m in sizes.items()}
    assert total == pytest.approx({"qwen3_vl_30b_a3b": 30.53, "qwen3_vl_235b_a22b": 235.09}, abs=0.01)
    active = {name: total[name] - idle[name] for name in NAMED}
    assert active == pytest.approx({"qwen3_vl_30b_a3b": 3.35, "qwen3_vl_235b_a22b": 22.19}, abs=0.01)
    length = 1000
    for name, model in sizes.items():
        tables = 2 * model.language.vocab_size * model.language.hidden_size
        per_token = decoder_flops(model.language, length) / length / 2
        attention = model.language.num_layers * length * 128 * model.language.num_heads
        assert per_token == pytest.approx(1e9 * active[name] - tables / 2 + attention, rel=1e-3)


WIDE = tiny_model(
    vision=VisionConfig(image_size=48, patch_size=4, hidden_size=24, ffn_hidden_size=48, num_layers=3, num_heads=2),
    language=LanguageConfig(
        vocab_size=300, hidden_size=48, ffn_hidden_size=112, num_layers=8, num_heads=4, num_kv_heads=2
    ),
)
BLOCK = ParallelConfig(
    pipeline=2, recompute=Recompute.FULL, recompute_method=RecomputeMethod.BLOCK, recompute_num_layers=2
)
LAYOUTS = [
    pytest.param(1, ParallelConfig(), Batching.PADDED, tuple(Part), id="one"),
    pytest.param(1, ParallelConfig(), Batching.PACKED, tuple(Part), id="one-packed"),
    pytest.param(1, ParallelConfig(), Batching.PADDED, (Part.PROJECTOR,), id="one-frozen", marks=pytest.mark.slow),
    pytest.param(2, ParallelConfig(pipeline=2), Batching.PADDED, tuple(Part), id="pp2", marks=pytest.mark.slow),
    pytest.param(2, ParallelConfig(pipeline=2), Batching.PACKED, tuple(Part), id="pp2-packed"),
    pytest.param(
        2,
        ParallelConfig(pipeline=2, virtual_pipeline=2),
        Batching.PADDED,
        tuple(Part),
        id="pp2-vpp2",
        marks=pytest.mark.slow,
    ),
    pytest.param(2, BLOCK, Batching.PACKED, tuple(Part), id="pp2-recompute"),
    pytest.param(
        2,
        ParallelConfig(tensor=2, sequence_parallel=True),
        Batching.PADDED,
        tuple(Part),
        id="tp2-sp",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        2,
        ParallelConfig(distributed_optimizer=True),
        Batching.PACKED,
        tuple(Part),
        id="dp2-zero",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("num_ranks", "parallel", "batching", "trainable"), LAYOUTS)
def test_memory_is_what_ranks_allocate(
    ranks: Pools, num_ranks: int, parallel: ParallelConfig, batching: Batching, trainable: tuple[Part, ...]
) -> None:
    recipe = tiny_recipe(WIDE, parallel, global_batch_size=NUM_SAMPLES, trainable=trainable)
    recipe = replace(recipe, train=replace(recipe.train, batching=batching, seq_length=512))
    samples = tiny_samples(WIDE, NUM_SAMPLES)
    lengths = np.array([one.planned(WIDE, 512).sequence.length for one in samples])
    units = np.array([sum(num_views(WIDE.variant, grid) for grid in one.grids) for one in samples])
    load = step_load(recipe, Shapes(lengths, units, "tiny"), num_ranks // model_ranks(parallel))
    for stage, found in ranks(num_ranks).run(allocated, recipe):
        expected = rank_memory(recipe, load, num_ranks, stage, fused=False)
        assert expected.total == pytest.approx(found, rel=TOLERANCE), f"stage {stage}: {expected}"
