"""A rank of any world, built on one machine: a process group that sends nothing, and a model without memory.

Each chosen rank joins a group of torch's `fake` backend, creates its groups, builds its modules of fake tensors, and
plans its step, as it would among all ranks. So the time and memory of a rank's start and planning can be seen for
thousands of ranks before there is a machine for them. What such a rank cannot show: messages, kernels, and files.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import LayoutError
from megatron_deepstack.planning.batch.dealing import Deal, deal
from megatron_deepstack.planning.batch.packing import filler, merge
from megatron_deepstack.planning.batch.sequence import expand
from megatron_deepstack.planning.batch.step_plan import StepPlan, plan_training_step
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.budget.load import Shapes, usual_shape
from megatron_deepstack.planning.check import check_world, model_ranks
from megatron_deepstack.planning.exchange.routes import PlannedSample
from megatron_deepstack.planning.exchange.rows import context_length
from megatron_deepstack.planning.views import ImageShape, ViewGrid

MOST_RANKS = 4096


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a rank's start or step."""

    rank: int
    name: str
    seconds: float
    """Process CPU time."""
    grown_bytes: int
    """Growth of the process's largest resident memory."""
    note: str = ""


def dry_run(recipe: Recipe, world_size: int, ranks: tuple[int, ...], shapes: Shapes) -> Iterator[Part]:
    """Build some ranks of a world and plan one step of each.

    Args:
        recipe: The recipe.
        world_size: Number of ranks, up to 4,096.
        ranks: Ranks to build.
        shapes: Sizes of the samples of one step, over all replicas.

    Yields:
        The parts of each rank, as they are done.

    Raises:
        LayoutError: The world is too large or does not hold whole replicas, or a rank is not in it.
    """
    if not 1 <= world_size <= MOST_RANKS:
        nearest = max(min(world_size, MOST_RANKS), 1)
        raise LayoutError([f"--world: found {world_size}, expected 1 to {MOST_RANKS}; the nearest is {nearest}"])
    check_world(recipe, world_size)
    for rank in ranks:
        if not 0 <= rank < world_size:
            nearest = min(max(rank, 0), world_size - 1)
            raise LayoutError([f"--rank: found {rank} in a world of {world_size}; the nearest is {nearest}"])
    for rank in ranks:
        yield from _rank(recipe, world_size, rank, shapes)


def _rank(recipe: Recipe, world_size: int, rank: int, shapes: Shapes) -> Iterator[Part]:
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_deepstack.platform.compute.megatron_cpu import adapt_megatron

    adapt_megatron()
    from megatron_deepstack.model.build import build_model, freeze
    from megatron_deepstack.parallel.groups import create_groups
    from megatron_deepstack.platform.processes.garbage import settle

    settle()  # as in training; else a collection of all that torch has created may fall into a part
    found: list[Part] = []

    @contextmanager
    def part(name: str, note: list[str] | None = None) -> Iterator[None]:
        begin, before = time.process_time(), _resident()
        yield
        seconds, grown = time.process_time() - begin, _resident() - before
        found.append(Part(rank, name, seconds, grown, " ".join(note or ())))

    with part("join"):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with part("groups"):
            groups = create_groups(recipe.parallel, recipe.train.seed)
        note: list[str] = []
        with part("model", note), FakeTensorMode():
            train = recipe.train
            model = build_model(recipe.model, recipe.parallel, train.precision, groups, recipe.lora, train.fp8_scaling)
            freeze(model, train.trainable)
            modules: list[torch.nn.Module] = [*model.chunks, model.encoder]
            held = sum(p.numel() * p.element_size() for one in modules for p in one.parameters())
            note.append(f"{held / 1e9:.3g} GB of weights")
        yield from found
        found.clear()
        replicas, place = world_size // model_ranks(recipe.parallel), groups.place.dp
        with part("first step"):  # which also fills the tables of images' rows, once in a run
            _plan(recipe, _deal(recipe, shapes, replicas), shapes, place, groups.replica_rank)
        with part("deal a step"):
            dealt = _deal(recipe, shapes, replicas)
        note = []
        with part("plan the rank's step", note):
            plan = _plan(recipe, dealt, shapes, place, groups.replica_rank)
            note.append(f"{plan.num_micro_batches} micro-batches, {plan.routes.num_received} rows received")
        yield from found
    finally:
        dist.destroy_process_group()


def _deal(recipe: Recipe, shapes: Shapes, replicas: int) -> Deal:
    costs = shapes.encoder_costs(recipe.model)
    return deal(shapes.lengths, costs, recipe.model.language, recipe.parallel, recipe.train, replicas)


def _plan(recipe: Recipe, dealt: Deal, shapes: Shapes, dp: int, replica_rank: int) -> StepPlan:
    mine = dealt.replica(dp)
    samples = {one: _sample(recipe, shapes, one) for batch in mine for row in batch for one in row}
    batches = [[merge([samples[one] for one in row]) if row else filler() for row in batch] for batch in mine]
    return plan_training_step(recipe.model, recipe.parallel, recipe.train, batches, replica_rank)


def _sample(recipe: Recipe, shapes: Shapes, number: int) -> PlannedSample:
    """A sample of the given length, with its views, or with a usual image if it has units and there is room for one."""
    model, length = recipe.model, int(shapes.lengths[number])
    grids: tuple[ImageShape, ...] = ()
    if shapes.views is not None:
        views, (here,) = shapes.views, np.nonzero(shapes.views.owner == number)
        sides = zip(*(side[here].tolist() for side in (views.frames, views.height, views.width)), strict=True)
        grids = tuple(ViewGrid(*one) for one in sides)
    elif shapes.units[number] > 0 and length > context_length(model, usual_shape(model)):
        grids = (usual_shape(model),)
    contexts = [context_length(model, grid) for grid in grids]
    tokens = np.full(max(length - sum(contexts) + len(contexts), len(contexts) + 1), 5, np.int64)
    tokens[: len(contexts)] = IMAGE_TOKEN_ID
    sequence = expand(
        "drawn", tokens, np.ones_like(tokens), contexts, seq_length=recipe.train.seq_length, truncate=True
    )
    return PlannedSample(sequence=sequence, grids=grids)


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
