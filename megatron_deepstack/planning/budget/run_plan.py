"""The estimate of a run: memory of each stage, whether it fits, FLOPs, bytes, the pipeline's timeline, and time.

`plan_run` is pure arithmetic on a recipe, the sizes of a step's samples and a machine; nothing is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from megatron_deepstack.config.check import find_problems
from megatron_deepstack.config.choices import EncoderPlacement, Part, Precision, Recompute, RecomputeModule, Switch
from megatron_deepstack.config.schema import ParallelConfig, Recipe, TrainConfig
from megatron_deepstack.errors import LayoutError
from megatron_deepstack.planning.budget.cost import (
    decoder_training_flops,
    encoder_training_flops,
    head_training_flops,
)
from megatron_deepstack.planning.budget.durations import Bytes, Durations
from megatron_deepstack.planning.budget.hardware import Machine
from megatron_deepstack.planning.budget.load import Numbers, Shapes, StepLoad, StepLoads
from megatron_deepstack.planning.budget.memory import RankMemory, stage_memories, uses_fused_layers
from megatron_deepstack.planning.budget.pipeline import BACKWARD, FORWARD, Timeline, simulate
from megatron_deepstack.planning.check import check_world, find_plan_problems, model_ranks
from megatron_deepstack.planning.slots import Chunk, stage_chunks

_SIMULATED_PASSES = 1000
"""Most passes that are simulated; the rest of a longer schedule is added at the rate of its slowest stage."""
_EXPOSED = 0.1
"""Share of an overlapped reduction that does not hide: the last bucket."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One pipeline stage."""

    stage: int
    chunks: tuple[Chunk, ...]
    memory: RankMemory


@dataclass(frozen=True, slots=True)
class Flops:
    """Model FLOPs of a step of all ranks, forward and backward."""

    decoder: float
    """Its layers."""
    head: float
    encoder: float

    @property
    def total(self) -> float:
        """All together."""
        return self.decoder + self.head + self.encoder


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """The parts of a predicted step."""

    encode: float
    """Encoder forward, and rows to their stages."""
    schedule: float
    encoder_backward: float
    """Gradients of rows back, and the encoder's backward."""
    reduction: float
    """What of the gradients' reduction does not hide behind the backward pass."""
    optimizer: float

    @property
    def total(self) -> float:
        """The whole step."""
        return self.encode + self.schedule + self.encoder_backward + self.reduction + self.optimizer


@dataclass(frozen=True, slots=True, eq=False)
class MemoryPlan:
    """What memory a run needs."""

    recipe: Recipe
    machine: Machine
    num_ranks: int
    load: StepLoad
    stages: tuple[StagePlan, ...]

    @property
    def limit_bytes(self) -> int | None:
        """Memory of a rank that is free for tensors; None where it is not known."""
        memory = self.machine.memory_bytes
        return None if memory is None else memory - self.machine.reserved_bytes

    @property
    def fullest(self) -> StagePlan:
        """The stage whose ranks need most memory."""
        return max(self.stages, key=lambda one: one.memory.total)

    @property
    def fits(self) -> bool:
        """Whether all ranks have enough memory, as far as it is known."""
        return self.limit_bytes is None or self.fullest.memory.total <= self.limit_bytes


@dataclass(frozen=True, slots=True, eq=False)
class RunPlan(MemoryPlan):
    """What is predicted of a run."""

    flops: Flops
    sent: Bytes
    """Of a rank of the stage that sends most."""
    timeline: Timeline
    """The simulated passes of each stage; the first micro-batches of a long step."""
    bubble: float
    """Share of the schedule in which a stage runs no pass, on average."""
    seconds: StepSeconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all replicas, visual ones included, padding not."""
        return self.load.tokens / self.seconds.total

    @property
    def mfu(self) -> float:
        """Model FLOP/s over the peak of all ranks."""
        return (
            self.flops.total / self.seconds.total / (self.num_ranks * self.machine.flops(self.recipe.train.precision))
        )

    @property
    def hours(self) -> float:
        """Hours of all steps of the recipe, without checkpoints and validation."""
        return self.seconds.total * self.recipe.train.steps / 3600


def plan_memory(recipe: Recipe, loads: StepLoads, machine: Machine, num_ranks: int) -> MemoryPlan:
    """Estimate the memory of a run, which takes far less time than to simulate its pipeline.

    Args:
        recipe: The recipe.
        loads: Loads of the samples of one step, made for the recipe's model and its section `train`.
        machine: The kind of device.
        num_ranks: Number of all ranks.

    Returns:
        The estimate.

    Raises:
        LayoutError: The ranks do not hold whole replicas, or the batch does not divide.
    """
    check_world(recipe, num_ranks)
    load = loads.of(recipe.parallel, num_ranks // model_ranks(recipe.parallel))
    fused = uses_fused_layers(recipe, on_gpu=not machine.is_cpu)
    chunks = stage_chunks(recipe.model.language.num_layers, recipe.parallel)
    memories = stage_memories(recipe, load, num_ranks, fused=fused, device_bytes=machine.memory_bytes)
    stages = tuple(
        StagePlan(stage, tuple(chunk for chunk in chunks if chunk.pp == stage), memory)
        for stage, memory in enumerate(memories)
    )
    return MemoryPlan(recipe, machine, num_ranks, load, stages)


def plan_time(plan: MemoryPlan) -> RunPlan:
    """Estimate the time of a run whose memory is known.

    Args:
        plan: The estimate of its memory.

    Returns:
        The whole estimate.
    """
    recipe, load, stages = plan.recipe, plan.load, plan.stages
    durations = Durations(recipe, load, plan.machine, plan.num_ranks)
    timeline, schedule, bubble = _schedule(recipe, stages, durations)
    encode, encode_back = durations.encode()
    sent = max(
        durations.bytes_of_stages([sum(chunk.stop - chunk.first for chunk in one.chunks) for one in stages]),
        key=lambda one: one.tensor + one.expert + one.context + one.pipeline + one.rows + one.gradients,
    )
    seconds = StepSeconds(
        encode=encode,
        schedule=schedule,
        encoder_backward=encode_back,
        reduction=max(_exposed(recipe, one, durations) for one in stages),
        optimizer=max(durations.update(one.stage) for one in stages),
    )
    return RunPlan(
        recipe, plan.machine, plan.num_ranks, load, stages, _flops(recipe, load), sent, timeline, bubble, seconds
    )


def plan_run(recipe: Recipe, shapes: Shapes, machine: Machine, num_ranks: int) -> RunPlan:
    """Estimate a run.

    Args:
        recipe: The recipe.
        shapes: Sizes of the samples of one step.
        machine: The kind of device.
        num_ranks: Number of all ranks.

    Returns:
        The estimate.

    Raises:
        LayoutError: The ranks do not hold whole replicas, or the batch does not divide.
    """
    return plan_time(plan_memory(recipe, StepLoads(recipe.model, recipe.train, shapes), machine, num_ranks))


def _flops(recipe: Recipe, load: StepLoad) -> Flops:
    model, trainable = recipe.model, recipe.train.trainable
    decoder = decoder_training_flops(model.language, trainable, recipe.lora, load.tokens, load.token_squares)
    head = head_training_flops(model.language, trainable, recipe.lora, float(load.tokens))
    encoder = encoder_training_flops(model, trainable, recipe.lora, load.total_work)
    return Flops(decoder=decoder - head, head=head, encoder=encoder)


def _schedule(recipe: Recipe, stages: tuple[StagePlan, ...], durations: Durations) -> tuple[Timeline, float, float]:
    """Return the simulated passes, the seconds of the whole schedule, and the share of it that is idle."""
    parallel = recipe.parallel
    places = sorted((chunk for one in stages for chunk in one.chunks), key=lambda chunk: (chunk.vpp, chunk.pp))
    forward, backward = zip(*(durations.passes(chunk) for chunk in places), strict=True)
    shown = _shown(parallel, len(durations.positions))
    timeline = simulate(
        parallel.pipeline,
        parallel.virtual_pipeline,
        [one[shown].tolist() for one in forward],
        [one[shown].tolist() for one in backward],
        durations.message(),
    )
    work = [there + back for there, back in zip(forward, backward, strict=True)]
    whole, busy = np.zeros(parallel.pipeline), np.zeros(parallel.pipeline)
    for chunk, seconds in zip(places, work, strict=True):
        whole[chunk.pp] += seconds.sum()
        busy[chunk.pp] += seconds[shown].sum()
    schedule = float(timeline.seconds + whole.max() - busy.max())
    bubble = 1 - float(whole.mean()) / schedule if schedule else 0.0
    return timeline, schedule, max(bubble, 0.0)


def _shown(parallel: ParallelConfig, num_micro_batches: int) -> Numbers:
    """Choose the micro-batches that are simulated: all of a short step, every n-th of a long one."""
    round_ = parallel.pipeline
    most = max(_SIMULATED_PASSES // (2 * round_ * parallel.virtual_pipeline) // round_, 2) * round_
    shown = np.arange(0, num_micro_batches, max(num_micro_batches // most, 1))[:most]
    if parallel.virtual_pipeline > 1:
        shown = shown[: max(len(shown) // round_ * round_, round_)]
    return shown


def _exposed(recipe: Recipe, stage: StagePlan, durations: Durations) -> float:
    """Return the seconds of a stage's reduction that nothing hides."""
    whole = durations.reduce(stage.stage)
    if not recipe.parallel.overlap_grad_reduce:
        return whole
    last = sum(float(durations.passes(chunk)[1][-1]) for chunk in stage.chunks)
    return max(whole - last, _EXPOSED * whole)


def advice(plan: MemoryPlan, shapes: Shapes) -> str:
    """Find what would make a run fit.

    Args:
        plan: A plan that does not fit.
        shapes: The samples that it was made with.

    Returns:
        What to add to the command line, quoted for a shell: more ranks, where replicas share the optimizer's states,
        or overrides, of one knob if one is enough; if both help, the two joined by " or ". Empty if no change that is
        known here helps.
    """
    return " or ".join(filter(None, (_more_replicas(plan, shapes), _overrides(plan, shapes))))


def _more_replicas(plan: MemoryPlan, shapes: Shapes) -> str:
    """Find the smallest number of ranks, up to eight times as many, with which the distributed optimizer fits."""
    recipe = plan.recipe
    if not recipe.parallel.distributed_optimizer:
        return ""
    loads = StepLoads(recipe.model, recipe.train, shapes)
    for factor in (2, 4, 8):
        num_ranks = factor * plan.num_ranks
        try:
            if plan_memory(recipe, loads, plan.machine, num_ranks).fits:
                return f"--ranks {num_ranks}"
        except LayoutError:
            continue  # so many replicas do not divide the batch
    return ""


def _overrides(plan: MemoryPlan, shapes: Shapes) -> str:
    """Find the fewest changes of the recipe with which it fits on as many ranks."""
    knobs = list(_knobs(plan))
    loads: dict[TrainConfig, StepLoads] = {}
    for number in (1, 2, 3):
        for chosen in combinations(knobs, number):
            recipe, texts = plan.recipe, list[str]()
            for text, change in chosen:
                recipe, texts = change(recipe), [*texts, text]
            if find_problems(recipe) or find_plan_problems(recipe):
                continue
            if recipe.train not in loads:
                loads[recipe.train] = StepLoads(recipe.model, recipe.train, shapes)
            try:
                if plan_memory(recipe, loads[recipe.train], plan.machine, plan.num_ranks).fits:
                    return " ".join(texts)
            except LayoutError:
                continue
    return ""


def _knobs(plan: MemoryPlan) -> Iterator[tuple[str, Callable[[Recipe], Recipe]]]:
    """List changes of the recipe that lower memory, the cheapest in time first."""
    recipe, parallel = plan.recipe, plan.recipe.parallel
    if not parallel.distributed_optimizer and plan.num_ranks > 1:
        yield "parallel.distributed_optimizer=true", _parallel(distributed_optimizer=True)
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        yield "parallel.sequence_parallel=true", _parallel(sequence_parallel=True)
    if parallel.encoder_placement is EncoderPlacement.SPREAD and parallel.rows_on_host is not Switch.ALWAYS:
        yield "parallel.rows_on_host=always", _parallel(rows_on_host=Switch.ALWAYS)
    if Part.VISION in recipe.train.trainable and not (parallel.encoder_chunk_views or parallel.encoder_memory_gib):
        yield "parallel.encoder_chunk_views=8", _parallel(encoder_chunk_views=8)
    if recipe.train.micro_batch_size > 1:
        yield "train.micro_batch_size=1", lambda one: replace(one, train=replace(one.train, micro_batch_size=1))
    if parallel.recompute is Recompute.NONE:
        mlp = _parallel(recompute=Recompute.SELECTIVE, recompute_modules=(RecomputeModule.MLP,))
        yield "parallel.recompute=selective 'parallel.recompute_modules=[mlp]'", mlp
    if parallel.recompute is not Recompute.FULL:
        yield "parallel.recompute=full", _parallel(recompute=Recompute.FULL)
    if recipe.train.precision is Precision.FP32 and not plan.machine.is_cpu:
        yield "train.precision=bf16", lambda one: replace(one, train=replace(one.train, precision=Precision.BF16))
    for size in (2, 4, 8, 16):
        if size > parallel.tensor and size <= 8:
            changes = {"tensor": size, "sequence_parallel": True}
            yield f"parallel.tensor={size} parallel.sequence_parallel=true", _parallel(**changes)
        if size > parallel.pipeline:
            yield f"parallel.pipeline={size}", _parallel(pipeline=size, layers_per_stage=None)
    if parallel.encoder_placement is EncoderPlacement.INLINE:
        yield "parallel.encoder_placement=spread", _parallel(encoder_placement=EncoderPlacement.SPREAD)
    if Part.LANGUAGE in recipe.train.trainable and not recipe.lora.rank:
        yield "lora.rank=16", lambda one: replace(one, lora=replace(one.lora, rank=16))


def _parallel(**changes: object) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, parallel=replace(recipe.parallel, **changes))  # type: ignore[arg-type]


def boxes(plan: RunPlan, stage: int) -> Iterator[tuple[str, int | None, int, float, float]]:
    """List what a rank of a stage does in the predicted step.

    Args:
        plan: The plan.
        stage: Number of the stage.

    Yields:
        Kind, micro-batch, chunk, begin and end of each action, in seconds from the beginning of the step.
    """
    parts, start = plan.seconds, plan.seconds.encode
    if parts.encode:
        yield "encode", None, 0, 0.0, parts.encode
    for one in plan.timeline.of_stage(stage):
        kind = "forward" if one.kind == FORWARD else BACKWARD
        yield kind, one.micro_batch, one.chunk, start + one.begin, start + one.end
    end = start + plan.timeline.seconds
    for kind, seconds in (
        ("encoder backward", parts.encoder_backward),
        ("finalise", parts.reduction),
        ("optimizer", parts.optimizer),
    ):
        if seconds:
            yield kind, None, 0, end, end + seconds
        end += seconds


NOT_MODELLED: Mapping[str, str] = {
    "memory": "communication buffers, workspaces and fragmentation beyond a fixed reserve; CUDA graphs; FP8 copies",
    "time": "reading data, checkpoints, validation, kernel launches, jitter, other traffic on the network, activations "
    "on their way to the host and back",
}
"""What an estimate leaves out, in words."""
