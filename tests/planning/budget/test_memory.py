"""Memory is what ranks allocate: tiny models, one step under a counter of live bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_deepstack.config.choices import (
    Batching,
    EncoderPlacement,
    LoraTarget,
    Part,
    Recompute,
    RecomputeMethod,
    RecomputeModule,
    Variant,
)
from megatron_deepstack.config.schema import (
    LanguageConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    QFormerConfig,
    Recipe,
    StackConfig,
    VisionConfig,
)
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.planning.budget.cost import EncoderWork
from megatron_deepstack.planning.budget.encoder_memory import projector_elements
from megatron_deepstack.planning.budget.load import Shapes, Views, step_load
from megatron_deepstack.planning.budget.memory import stage_memories
from megatron_deepstack.planning.check import model_ranks
from megatron_deepstack.planning.exchange.image_plan import image_plan
from megatron_deepstack.planning.exchange.rows import context_length
from megatron_deepstack.planning.views import ViewGrid
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import (
    TinySample,
    tiny_model,
    tiny_qwen3_vl,
    tiny_recipe,
    tiny_samples,
    tiny_share,
    unit_pixels,
)

Pools = Callable[[int], RankPool]
NUM_SAMPLES = 16
SEQ_LENGTH = 1536

# Measured over the cases below: -4.5 % to +4.7 %. Not among them: full uniform recomputation on a last stage of
# padded rows (+6 %), and context parallelism, whose attention on a CPU gathers keys and values, not as on GPUs.
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
    samples = samples_of(recipe.model)
    planned, images = tiny_share(samples, recipe, groups.place.dp, groups.axes.dp)
    packed = train.batching is Batching.PACKED
    plan = plan_step(recipe.model, recipe.parallel, planned, groups.replica_rank, packed=packed)
    pixels = unit_pixels(recipe.model, images, plan)
    weights = [p for part in (*model.chunks, model.encoder) for p in part.parameters()]
    buffers = [buffer.grad_data for ddp in engine.wrapped for buffer in ddp.buffers]
    lasting = {tensor.untyped_storage()._cdata for tensor in (*weights, *buffers)}  # whose views are no new bytes
    for step in range(2):
        with LiveBytes(lambda tensor: tensor.untyped_storage()._cdata not in lasting) as live:
            forward_backward(engine, plan, pixels, StepClock())
        optimizer.step(step)
    states = [state for one in optimizer.chained.chained_optimizers for state in one.optimizer.state.values()]
    held = sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor))
    held += sum(tensor.nbytes for tensor in (*weights, *buffers))
    return groups.place.pp, held + live.peak


SCALE = 4
"""Larger sides of views of any size, so that activations outweigh weights."""


def samples_of(model: ModelConfig) -> list[TinySample]:
    """The samples of a step; views of any size are larger than those of other tests."""
    samples, found = tiny_samples(model, NUM_SAMPLES), []
    for one in samples:
        grids = tuple(
            replace(grid, height=SCALE * grid.height, width=SCALE * grid.width) if isinstance(grid, ViewGrid) else grid
            for grid in one.grids
        )
        if grids != one.grids:
            pixels = tuple(image.repeat(SCALE, axis=1).repeat(SCALE, axis=2) for image in one.pixels)
            one = replace(one, grids=grids, pixels=pixels)
        found.append(one)
    return found


def shapes_of(model: ModelConfig, samples: list[TinySample]) -> Shapes:
    """Their sizes."""
    sequences = [one.planned(model, SEQ_LENGTH).sequence for one in samples]
    lengths = np.array([one.length for one in sequences])
    targets = np.array([int((one.labels != IGNORE_INDEX).sum()) for one in sequences])
    visual = np.array([sum(span.length for span in one.spans) for one in sequences])
    if not model.variant.traits.is_native:
        plans = [[image_plan(model, grid, context_length(model, grid)) for grid in one.grids] for one in samples]
        units = np.array([sum(len(plan.units) for plan in some) for some in plans])
        return Shapes(lengths, units, visual, "tiny", targets=targets)
    views = [(n, g.frames, g.height, g.width) for n, one in enumerate(samples) for g in one.grids]  # type: ignore[union-attr]
    return Shapes(lengths, visual, visual, "tiny", Views(*np.array(views).T), targets)


WIDE = tiny_model(
    vision=VisionConfig(image_size=48, patch_size=4, hidden_size=24, ffn_hidden_size=48, num_layers=3, num_heads=2),
    language=LanguageConfig(
        vocab_size=300, hidden_size=48, ffn_hidden_size=112, num_layers=8, num_heads=4, num_kv_heads=2
    ),
)
NATIVE = tiny_qwen3_vl(language=replace(tiny_qwen3_vl().language, vocab_size=300, hidden_size=48, ffn_hidden_size=112))
GRID = ViewGrid(frames=1, height=8, width=12)
QFORMERS = tiny_model(
    variant=Variant.GRANITE4_VISION,
    vision=VisionConfig(
        kind="siglip", image_size=64, patch_size=4, hidden_size=24, ffn_hidden_size=64, num_layers=4, num_heads=3,
        taps=(1, 1, 2), tile_grids=("2x2", "1x2"),
    ),
    stacks=StackConfig(slots=(0, 3, 5)),
    qformer=QFormerConfig(
        query_side=2, window_side=4, num_sampled=2, num_layers=3, num_heads=3, ffn_hidden_size=40,
        cross_attention_interval=2,
    ),
)  # fmt: skip
BLOCK = ParallelConfig(
    pipeline=2, recompute=Recompute.FULL, recompute_method=RecomputeMethod.BLOCK, recompute_num_layers=2
)
MLP = ParallelConfig(pipeline=2, recompute=Recompute.SELECTIVE, recompute_modules=(RecomputeModule.MLP,))
NORMS = ParallelConfig(recompute=Recompute.SELECTIVE, recompute_modules=(RecomputeModule.LAYER_NORM,))
HOST = ParallelConfig(offload_layers=5, offload_above_mib=0.0)
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
    pytest.param(2, MLP, Batching.PACKED, tuple(Part), id="pp2-mlp", marks=pytest.mark.slow),
    pytest.param(1, NORMS, Batching.PACKED, tuple(Part), id="one-norms", marks=pytest.mark.slow),
    pytest.param(
        1, replace(HOST, offload_layers=2), Batching.PACKED, tuple(Part), id="one-host", marks=pytest.mark.slow
    ),
    pytest.param(
        1, replace(HOST, offload_layers=8), Batching.PADDED, tuple(Part), id="one-all-host", marks=pytest.mark.slow
    ),
    pytest.param(
        2,
        replace(HOST, pipeline=2, offload_layers=3),
        Batching.PACKED,
        tuple(Part),
        id="pp2-host",
        marks=pytest.mark.slow,
    ),
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


def check(ranks: Pools, recipe: Recipe, num_ranks: int) -> None:
    """Compare each rank's largest allocation with what is predicted of its stage."""
    shapes = shapes_of(recipe.model, samples_of(recipe.model))
    load = step_load(recipe, shapes, num_ranks // model_ranks(recipe.parallel))
    expected = stage_memories(recipe, load, num_ranks, fused=False)
    for stage, found in ranks(num_ranks).run(allocated, recipe):
        assert expected[stage].total == pytest.approx(found, rel=TOLERANCE), f"stage {stage}: {expected[stage]}"


def recipe_of(model: ModelConfig, parallel: ParallelConfig, batching: Batching, trainable: tuple[Part, ...]) -> Recipe:
    recipe = tiny_recipe(model, parallel, global_batch_size=NUM_SAMPLES, trainable=trainable)
    return replace(recipe, train=replace(recipe.train, batching=batching, seq_length=SEQ_LENGTH))


@pytest.mark.parametrize(("num_ranks", "parallel", "batching", "trainable"), LAYOUTS)
def test_memory_is_what_ranks_allocate(
    ranks: Pools, num_ranks: int, parallel: ParallelConfig, batching: Batching, trainable: tuple[Part, ...]
) -> None:
    check(ranks, recipe_of(WIDE, parallel, batching, trainable), num_ranks)


EARLY = replace(WIDE, stacks=replace(WIDE.stacks, slots=(0, 1, 2, 3)))
"""All stacks on the first of two stages, which the encoder inside that stage needs."""
INLINE = ParallelConfig(encoder_placement=EncoderPlacement.INLINE)
IN_PARTS = ParallelConfig(encoder_chunk_views=8)
VARIANTS = {
    "v": (replace(WIDE, variant=Variant.DEEPSTACK_V), ParallelConfig(pipeline=2), tuple(Part)),
    "hd": (replace(WIDE, variant=Variant.DEEPSTACK_HD), ParallelConfig(pipeline=2), tuple(Part)),
    "hd-parts": (replace(WIDE, variant=Variant.DEEPSTACK_HD), IN_PARTS, tuple(Part)),
    "anyres": (replace(WIDE, variant=Variant.LLAVA_ANYRES), ParallelConfig(pipeline=2), tuple(Part)),
    "llava": (replace(WIDE, variant=Variant.LLAVA), ParallelConfig(pipeline=2), tuple(Part)),
    "in-sequence": (replace(WIDE, variant=Variant.IN_SEQUENCE), ParallelConfig(pipeline=2), tuple(Part)),
    "shared-slots": (replace(WIDE, stacks=replace(WIDE.stacks, slots=(0, 0, 3, 3))), ParallelConfig(), tuple(Part)),
    "inline": (EARLY, INLINE, tuple(Part)),
    "inline-pp2": (EARLY, replace(INLINE, pipeline=2), tuple(Part)),
    "native-inline": (NATIVE, INLINE, tuple(Part)),
    "parts": (WIDE, IN_PARTS, tuple(Part)),
    "q-formers": (QFORMERS, ParallelConfig(), tuple(Part)),
    "q-formers-parts": (QFORMERS, IN_PARTS, tuple(Part)),
    "q-formers-frozen-tower": (QFORMERS, ParallelConfig(), (Part.PROJECTOR, Part.LANGUAGE)),
    "decoder-alone": (WIDE, ParallelConfig(), (Part.LANGUAGE,)),
    "tower-alone": (WIDE, ParallelConfig(), (Part.VISION,)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "parallel", "trainable"), VARIANTS.values(), ids=VARIANTS)
def test_memory_of_variants_and_placements(
    ranks: Pools, model: ModelConfig, parallel: ParallelConfig, trainable: tuple[Part, ...]
) -> None:
    """Packed, the same cases are within -1.6 % to +4.1 %, but for Q-Formers in parts (-3.8 %)."""
    check(ranks, recipe_of(model, parallel, Batching.PADDED, trainable), model_ranks(parallel))


NATIVE_CASES = [
    pytest.param(1, ParallelConfig(), tuple(Part), id="one"),
    pytest.param(1, ParallelConfig(), (Part.PROJECTOR, Part.LANGUAGE), id="frozen-tower", marks=pytest.mark.slow),
    pytest.param(1, ParallelConfig(), (Part.PROJECTOR,), id="mergers-alone", marks=pytest.mark.slow),
    pytest.param(2, ParallelConfig(pipeline=2), tuple(Part), id="pp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("batching", [pytest.param(Batching.PADDED, marks=pytest.mark.slow), Batching.PACKED])
@pytest.mark.parametrize(("num_ranks", "parallel", "trainable"), NATIVE_CASES)
def test_memory_of_views_of_any_size(
    ranks: Pools, num_ranks: int, parallel: ParallelConfig, batching: Batching, trainable: tuple[Part, ...]
) -> None:
    check(ranks, recipe_of(NATIVE, parallel, batching, trainable), num_ranks)


@pytest.mark.parametrize("name", ["qwen3_vl", "granite4_vision", "deepstack_l"])
def test_projectors_keep_what_is_said(ranks: Pools, name: str) -> None:
    """Measured: 0 to 4 % above what is counted, the statistics of norms and of attention."""
    model = {"qwen3_vl": NATIVE, "granite4_vision": QFORMERS, "deepstack_l": WIDE}[name]
    views = 6
    work = EncoderWork.of_grids(model, [GRID] * views) if name == "qwen3_vl" else EncoderWork.of_units(model, views)
    said = 4 * projector_elements(model, work, learns=True)
    assert said <= ranks(1).run(kept_by_projector, model, work)[0] < 1.05 * said


ADAPTED = {
    "all": (tuple(LoraTarget), tuple(Part)),
    "qkv, decoder too": ((LoraTarget.QKV,), tuple(Part)),
    "qkv": ((LoraTarget.QKV,), (Part.VISION,)),
    "out and in": ((LoraTarget.ATTENTION_OUTPUT, LoraTarget.MLP_IN), (Part.VISION,)),
    "mlp out": ((LoraTarget.MLP_OUT,), (Part.VISION,)),
}


@pytest.mark.parametrize("model", [WIDE, NATIVE], ids=["one-size", "any-size"])
@pytest.mark.parametrize(("targets", "trainable"), ADAPTED.values(), ids=ADAPTED)
def test_memory_of_towers_with_adapters(
    ranks: Pools, model: ModelConfig, targets: tuple[LoraTarget, ...], trainable: tuple[Part, ...]
) -> None:
    """A frozen tower with adapters keeps less than one that learns: 3 % to 39 % of all memory here."""
    recipe = recipe_of(model, ParallelConfig(), Batching.PACKED, trainable)
    adapters = LoraConfig(
        rank=4, targets=(LoraTarget.QKV,) if Part.LANGUAGE in trainable else (), vision_targets=targets
    )
    check(ranks, replace(recipe, lora=adapters), 1)


def test_memory_of_a_projector_with_adapters(ranks: Pools) -> None:
    recipe = recipe_of(WIDE, ParallelConfig(), Batching.PACKED, (Part.PROJECTOR,))
    check(ranks, replace(recipe, lora=LoraConfig(rank=4, targets=(), projector=True)), 1)


def kept_by_projector(rank: int, model: ModelConfig, work: EncoderWork) -> int:
    """Bytes that autograd keeps of the projector, without parameters and features."""
    import torch

    from megatron_deepstack.model.vision.encoder import build_projector

    projector, width, taps = build_projector(model, torch.float32), model.vision.hidden_size, set(model.vision.taps)
    features = torch.randn(int(work.views), int(work.patches / work.views), width)
    if model.variant.traits.is_native:
        features = torch.randn(int(work.patches), 1 + len(taps), width)
    elif taps:
        features = features[:, :, None].repeat(1, 1, len(taps), 1)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.normal_()
    own = {x.untyped_storage()._cdata for x in (features, *projector.parameters())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        rows = projector(features)
    assert rows.requires_grad
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


def test_stacks_that_share_a_slot_have_a_row_each() -> None:
    """On one rank it makes no difference to the rows before which layers stacks are added."""
    rows = []
    for slots in ((0, 3, 5, 7), (0, 0, 3, 3)):
        model = replace(WIDE, stacks=replace(WIDE.stacks, slots=slots))
        recipe = recipe_of(model, ParallelConfig(), Batching.PADDED, tuple(Part))
        load = step_load(recipe, shapes_of(model, samples_of(model)), 1)
        rows.append(stage_memories(recipe, load, 1, fused=False)[0].rows)
    assert rows[0] == rows[1] > 0
