"""What the stage plan and the number of ranks require of a recipe, checked before any process starts.

`config.check` knows the fields of a recipe. This module adds the rules that need the plan made from them: every slot is
in the model, every layer is in one stage, the encoder is on the stage of its slots if it runs inline, and the numbers
of ranks and samples divide evenly. The rules are pure arithmetic with the same result on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import gcd, log2
from pathlib import Path

from megatron_deepstack.config.check import find_problems, out_of_range
from megatron_deepstack.config.choices import (
    Batching,
    EncoderPlacement,
    Layers,
    LoraTarget,
    Part,
    Precision,
    Recompute,
    RecomputeMethod,
)
from megatron_deepstack.config.load import read_recipe
from megatron_deepstack.config.problems import Problem, raise_problems, without_echoes
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, Recipe
from megatron_deepstack.config.sizes import expert_layers
from megatron_deepstack.config.traits.variants import StackSource
from megatron_deepstack.errors import ConfigError, LayoutError
from megatron_deepstack.planning.budget.linears import FP8_TOKENS, fp8_side, linear_sizes
from megatron_deepstack.planning.exchange.vit_stacks import plan_vit_stacks
from megatron_deepstack.planning.slots import decoder_slots, layers_per_chunk, most_decoder_stacks, stage_chunks


def load_checked_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe as `load_recipe` does, and check its plan at the same time.

    Args:
        path: A YAML file, or the bare name of a recipe of the package.
        overrides: Each `section.field=value`, applied in order.

    Returns:
        The checked recipe.

    Raises:
        ConfigError: There are problems in the file, the overrides, the values or the plan. The error holds all of them.
    """
    recipe, problems = read_recipe(path, overrides)
    return checked(recipe, problems)


def checked(recipe: Recipe, problems: list[Problem]) -> Recipe:
    """Check the plan of a recipe, and report its problems together with those that are already known.

    Args:
        recipe: The recipe.
        problems: Its problems that are already known.

    Returns:
        The same recipe, if there are no problems.

    Raises:
        ConfigError: There are problems. If all problems are of one subclass, that class is raised.
    """
    raise_problems(problems + without_echoes(find_plan_problems(recipe), problems))
    return recipe


def check_plan(recipe: Recipe) -> None:
    """Check the plan of a recipe that has no other problems.

    Raises:
        SlotError: A stack has no layer.
        LayoutError: The layout does not fit the model.
        ConfigError: There are problems of several kinds.
    """
    raise_problems(find_plan_problems(recipe))


def find_plan_problems(recipe: Recipe) -> list[Problem]:
    """Return all problems of slots and stages, or, if numbers of model or layout allow no plan, only their problems."""
    unfit = list(out_of_range(recipe, ("model.", "parallel.")))
    if unfit:
        return unfit
    found = list(_slots(recipe))
    found += _stages(recipe)
    if not found:
        found += _inline(recipe)
        found += _recompute(recipe)
        found += _idle_stages(recipe)
        found += _stages_without_experts(recipe)
        found += _adapters(recipe)
        found += _fp8(recipe)
    return found


def _problems_of(error: ConfigError, *paths: str) -> Iterator[Problem]:
    """Turn the messages of an error of `planning.slots`, which begin with a path, into problems of other fields."""
    for message in error.problems:
        yield Problem(paths=paths, text=message.partition(": ")[2], kind=type(error))


def _slots(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model
    yield from _num_stacks(model)
    try:
        decoder_slots(model)
        if model.variant.traits.stacks_in_vit:
            plan_vit_stacks(model)
    except ConfigError as error:
        yield from _problems_of(
            error, "model.stacks", "model.variant", "model.language.num_layers", "model.vision.num_layers"
        )


def _num_stacks(model: ModelConfig) -> Iterator[Problem]:
    """Only stacks that are sampled from crops and added in the decoder can be left out."""
    number, traits = model.stacks.num_stacks, model.variant.traits
    paths = ("model.stacks.num_stacks", "model.stacks.num_crops", "model.variant")
    if number is None:
        return
    if not traits.stacks_in_decoder or traits.stack_source is StackSource.TAPS:
        yield Problem(
            paths=paths, text=f"{number} says nothing about {model.variant}, whose stacks are fixed; leave it out"
        )
    elif number > most_decoder_stacks(model):
        yield Problem(
            paths=paths, text=f"{number} stacks, but an image has at most {most_decoder_stacks(model)}; lower it"
        )


def _stages(recipe: Recipe) -> Iterator[Problem]:
    try:
        stage_chunks(recipe.model.language.num_layers, recipe.parallel)
    except ConfigError as error:
        given = "layers_per_stage" if recipe.parallel.layers_per_stage is not None else "pipeline"
        others = ("parallel.pipeline", "parallel.virtual_pipeline", "model.language.num_layers")
        yield from _problems_of(error, f"parallel.{given}", *others)


def _recompute(recipe: Recipe) -> Iterator[Problem]:
    """Uniform recomputation handles a chunk in groups. megatron-core 0.16 fails if the last group is not full."""
    parallel = recipe.parallel
    if parallel.recompute is not Recompute.FULL or parallel.recompute_method is not RecomputeMethod.UNIFORM:
        return
    counts = layers_per_chunk(recipe.model.language.num_layers, parallel)
    uneven = sorted({count for count in counts if count % parallel.recompute_num_layers})
    if uneven:
        yield Problem(
            paths=("parallel.recompute_num_layers", "parallel.recompute_method"),
            text=f"groups of {parallel.recompute_num_layers} do not fill the chunks of {uneven} layers; use "
            "recompute_num_layers=1, a divisor, or recompute_method=block",
            kind=LayoutError,
        )


def _idle_stages(recipe: Recipe) -> Iterator[Problem]:
    """A stage without any part of a trained decoder has no optimizer for it, and the other stages would wait for it."""
    if Part.LANGUAGE not in recipe.train.trainable or recipe.lora.rank:
        return
    chunks = stage_chunks(recipe.model.language.num_layers, recipe.parallel)
    busy = {chunk.pp for chunk in chunks if chunk.first < chunk.stop or chunk.has_embedding or chunk.has_head}
    idle = [stage for stage in range(recipe.parallel.pipeline) if stage not in busy]
    if idle:
        yield Problem(
            paths=("parallel.layers_per_stage", "parallel.pipeline", "train.trainable"),
            text=f"stages {idle} hold no layer, embedding or head and have nothing to train, and the others would wait "
            f"for them in the gradient norm; give them a layer, or use parallel.pipeline={len(busy)}",
            kind=LayoutError,
        )


def _stages_without_experts(recipe: Recipe) -> Iterator[Problem]:
    """A stage without experts has no optimizer for them, and the other stages would wait for it."""
    layers, parallel = set(expert_layers(recipe.model.language)), recipe.parallel
    if not layers or recipe.lora.rank or Part.LANGUAGE not in recipe.train.trainable:
        return
    chunks = stage_chunks(recipe.model.language.num_layers, parallel)
    busy = {chunk.pp for chunk in chunks if any(layer in layers for layer in range(chunk.first, chunk.stop))}
    idle = [stage for stage in range(parallel.pipeline) if stage not in busy]
    if idle:
        yield Problem(
            paths=("parallel.layers_per_stage", "parallel.pipeline", "model.language.dense_layers"),
            text=f"stages {idle} hold no layer with experts, and the others would wait for them in the gradient norm; "
            f"give each a layer with experts, or use parallel.pipeline={len(busy)}",
            kind=LayoutError,
        )


def _adapters(recipe: Recipe) -> Iterator[Problem]:
    """Under LoRA a stage without layers has nothing to train, so the optimizers of other stages would wait for it."""
    if recipe.lora.rank and 0 in layers_per_chunk(recipe.model.language.num_layers, recipe.parallel):
        yield Problem(
            paths=("lora.rank", "parallel.layers_per_stage"),
            text="adapters sit in layers, and a stage has none; give each stage at least one layer",
            kind=LayoutError,
        )


def _fp8(recipe: Recipe) -> Iterator[Problem]:
    """Matrix products in 8 bits need sides that are multiples of 16 on every tensor-parallel rank, of 32 with MXFP8."""
    train, language, parallel = recipe.train, recipe.model.language, recipe.parallel
    if train.precision is not Precision.FP8:
        return
    if recipe.model.layers is Layers.LOCAL:
        yield Problem(
            paths=("train.precision", "model.layers"),
            text="fp8 is Transformer Engine's, and `local` layers have none of it; set model.layers=auto, or bf16",
        )
    multiple = fp8_side(train.fp8_scaling)
    for target, (inputs, outputs) in linear_sizes(language).items():
        row = target in (LoraTarget.ATTENTION_OUTPUT, LoraTarget.MLP_OUT)
        sides = (inputs // parallel.tensor, outputs) if row else (inputs, outputs // parallel.tensor)
        if any(side % multiple for side in sides):
            yield Problem(
                paths=("train.precision", "parallel.tensor", "model.language"),
                text=f"fp8 multiplies matrices of multiples of {multiple}; the decoder's {target} is {sides[0]} x "
                f"{sides[1]} on a rank; choose another parallel.tensor, or bf16",
            )
    unit = FP8_TOKENS * parallel.context
    if train.seq_length % unit:
        yield Problem(
            paths=("train.seq_length", "train.precision", "parallel.context"),
            text=f"{train.seq_length} tokens are no multiple of {unit} ({FP8_TOKENS} x parallel.context), which fp8 "
            f"takes; use {max(train.seq_length // unit, 1) * unit}",
        )


def _inline(recipe: Recipe) -> Iterator[Problem]:
    parallel = recipe.parallel
    if parallel.encoder_placement is not EncoderPlacement.INLINE:
        return
    first = stage_chunks(recipe.model.language.num_layers, parallel)[0]
    outside = [slot for slot in decoder_slots(recipe.model) if not first.owns(slot)]
    if outside:
        yield Problem(
            paths=("parallel.encoder_placement", "model.stacks", "parallel.layers_per_stage"),
            text=f"inline keeps stacks on the first stage's first chunk (layers {first.first} to {first.stop - 1}), "
            f"but slots {outside} lie behind it; use parallel.encoder_placement=spread",
            kind=LayoutError,
        )


def check_world(recipe: Recipe, world_size: int) -> None:
    """Check that a number of ranks fits a recipe.

    Args:
        recipe: A recipe whose plan has no problems.
        world_size: Number of all ranks.

    Raises:
        LayoutError: The ranks do not hold whole replicas, or the batch does not divide evenly over them.
    """
    raise_problems(list(_world(recipe, world_size)))


def model_ranks(parallel: ParallelConfig) -> int:
    """Return the number of ranks of one replica of the model."""
    return parallel.tensor * parallel.pipeline * parallel.context


def _world(recipe: Recipe, world_size: int) -> Iterator[Problem]:
    parallel = recipe.parallel
    ranks = model_ranks(parallel)
    if world_size < 1 or world_size % ranks:
        yield Problem(
            paths=("parallel",),
            text=f"a replica takes {ranks} ranks (tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
            f"{parallel.context}) and there are {world_size}, not a multiple of it; start "
            f"{max(world_size // ranks, 1) * ranks} ranks{_other_layout(recipe, world_size)}",
            kind=LayoutError,
        )
        return
    of_stage = world_size // parallel.pipeline
    if of_stage % parallel.expert:
        yield Problem(
            paths=("parallel.expert",),
            text=f"{parallel.expert} ranks share experts, and a stage has {of_stage} (of {world_size} in "
            f"{parallel.pipeline} stages), not a multiple of it; use parallel.expert={gcd(of_stage, parallel.expert)}, "
            "or more ranks",
            kind=LayoutError,
        )
    yield from _batches(recipe, world_size // ranks)


def _batches(recipe: Recipe, num_replicas: int) -> Iterator[Problem]:
    """Each replica needs a whole number of micro-batches, and of rounds over the stages if chunks interleave.

    Packs of the whole batch are dealt to replicas, with empty ones where they do not divide evenly.
    """
    batch, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    if recipe.train.batching is Batching.PACKED:
        if batch < num_replicas:
            yield Problem(
                paths=("train.global_batch_size",),
                text=f"{batch} samples for {num_replicas} replicas, some of which would never get one; use "
                f"{num_replicas} or more, or fewer ranks",
                kind=LayoutError,
            )
        return
    interleaved = recipe.parallel.virtual_pipeline > 1
    unit = micro * num_replicas * (recipe.parallel.pipeline if interleaved else 1)
    if batch % unit == 0:
        return
    rounds = f" x {recipe.parallel.pipeline} stages, which take turns under virtual_pipeline" if interleaved else ""
    lower = batch // unit * unit
    nearest = f"{lower} or {lower + unit}" if lower else str(unit)
    yield Problem(
        paths=("train.global_batch_size",),
        text=f"{batch} samples do not divide into {unit} (micro_batch_size {micro} x {num_replicas} replicas{rounds}); "
        f"use {nearest}",
        kind=LayoutError,
    )


def _other_layout(recipe: Recipe, world_size: int) -> str:
    """Name the layout for `world_size` ranks that is nearest to the recipe's; return an empty text if there is none."""
    candidates = [layout for layout in _layouts(recipe.parallel, world_size) if _fits(recipe, layout, world_size)]
    if not candidates:
        return ""
    best = min(candidates, key=lambda layout: _distance(recipe.parallel, layout))
    return f", or use parallel.tensor={best.tensor} parallel.pipeline={best.pipeline} parallel.context={best.context}"


def _layouts(parallel: ParallelConfig, world_size: int) -> Iterator[ParallelConfig]:
    divisors = [size for size in range(1, min(world_size, 512) + 1) if world_size % size == 0]
    for tensor, pipeline, context in product(divisors, repeat=3):
        if world_size % (tensor * pipeline * context) == 0:
            yield replace(
                parallel,
                tensor=tensor,
                pipeline=pipeline,
                context=context,
                virtual_pipeline=parallel.virtual_pipeline if pipeline > 1 else 1,
                sequence_parallel=parallel.sequence_parallel and tensor > 1,
                layers_per_stage=parallel.layers_per_stage if pipeline == parallel.pipeline else None,
            )


def _fits(recipe: Recipe, layout: ParallelConfig, world_size: int) -> bool:
    other = replace(recipe, parallel=layout)
    replicas = world_size // model_ranks(layout)
    return not (find_problems(other) or find_plan_problems(other) or list(_batches(other, replicas)))


def _distance(wanted: ParallelConfig, other: ParallelConfig) -> float:
    """Distance of two layouts in doublings. A change of context counts twice, since it changes memory least."""
    return (
        abs(log2(wanted.tensor / other.tensor))
        + abs(log2(wanted.pipeline / other.pipeline))
        + 2 * abs(log2(wanted.context / other.context))
    )
