"""Rows that rest on the host: equal losses and gradients, bit for bit, and few micro-batches' rows on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_deepstack.config.choices import Batching, Part, Recompute, Switch, Variant
from megatron_deepstack.config.schema import ParallelConfig, Recipe, StackConfig
from megatron_deepstack.planning.batch.sequence import padded_length
from megatron_deepstack.planning.budget.pipeline import forward_passes
from megatron_deepstack.planning.budget.received_rows import HOST_SHARE, rest_on_host
from megatron_deepstack.planning.exchange.routes import plan_routes
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_model, tiny_recipe, tiny_samples, tiny_share, unit_pixels

Pools = Callable[[int], RankPool]
WIDTH = 96
HD = tiny_model(variant=Variant.DEEPSTACK_HD, stacks=StackConfig(slots=(0, 1, 2, 3)))


def both_ways(rank: int, recipe: Recipe) -> tuple[bool, bool, bool, bool]:
    """Whether a step's loss and all gradients are equal bit for bit with rows on the device and on the host, twice.

    So is the loss of the same samples held out. Also whether any gradient is above zero, whether both steps used the
    same host memory, and whether rows went to the host twice, to be trained and held out, where they were to rest there
    and this rank adds any.
    """
    from megatron_deepstack.model.build import build_model, fill_model, freeze
    from megatron_deepstack.model.init import random_source
    from megatron_deepstack.planning.batch.step_plan import plan_training_step
    from megatron_deepstack.planning.budget import received_rows
    from megatron_deepstack.step import train_step
    from megatron_deepstack.step.clock import StepClock
    from megatron_deepstack.step.engine import build_engine

    groups, train = groups_for(recipe.parallel), recipe.train
    model = build_model(recipe.model, recipe.parallel, train.precision, groups)
    fill_model(model, random_source(recipe.model, 1), groups.decoder.tp)
    freeze(model, train.trainable)
    engine = build_engine(model, recipe.model, recipe.parallel, groups)
    planned, images = tiny_share(tiny_samples(recipe.model, train.global_batch_size, 3), recipe, groups.place.dp, 1)
    plan = plan_training_step(recipe.model, recipe.parallel, train, planned, groups.replica_rank)
    pixels = unit_pixels(recipe.model, images, plan)
    parameters = [p for ddp in engine.wrapped for p in ddp.params_with_grad]

    def step(where: Switch) -> tuple[tuple[float, float], list[torch.Tensor]]:
        asked = replace(engine, parallel=replace(engine.parallel, rows_on_host=where))
        loss = train_step.forward_backward(asked, plan, pixels, StepClock())
        gradients = [parameter.main_grad.clone() for parameter in parameters]
        held_out = train_step.held_out_loss(asked, plan, pixels)
        assert held_out.num_tokens == loss.num_tokens
        made.append(on_host.call_count)
        on_host.reset_mock()
        return (loss.total, held_out.total), gradients

    made: list[int] = []
    with (
        patch.object(received_rows, "WINDOW_BYTES", 1),
        patch.object(train_step, "HostRows", side_effect=train_step.HostRows) as on_host,
    ):
        expected, *found = (step(one) for one in (Switch.NEVER, Switch.ALWAYS, Switch.ALWAYS))
        stored = len(plan.routes.stored_rows)
        there = 2 if stored else 0
        places = {engine.row_memory.blocks(stored, [8], torch.float32)[0].data_ptr() for _ in range(2)}
    same = all(
        loss == expected[0] and all(torch.equal(a, b) for a, b in zip(gradients, expected[1], strict=True))
        for loss, gradients in found
    )
    return same, any(bool(one.any()) for one in expected[1]), len(places) == 1, made == [0, there, there]


FULL = {"recompute": Recompute.FULL}
CASES = [
    pytest.param(1, ParallelConfig(), tuple(Part), Batching.PADDED, id="one"),
    pytest.param(1, ParallelConfig(**FULL), (Part.PROJECTOR, Part.LANGUAGE), Batching.PACKED, id="frozen-tower"),
    pytest.param(1, ParallelConfig(), (Part.LANGUAGE,), Batching.PADDED, id="frozen-encoder"),
    pytest.param(2, ParallelConfig(pipeline=2), tuple(Part), Batching.PACKED, id="pp2"),
    pytest.param(2, ParallelConfig(pipeline=2, virtual_pipeline=2), tuple(Part), Batching.PADDED, id="pp2-vpp2"),
    pytest.param(2, ParallelConfig(tensor=2, sequence_parallel=True), tuple(Part), Batching.PADDED, id="tp2-sp"),
]


@pytest.mark.parametrize(("num_ranks", "parallel", "trainable", "batching"), CASES)
def test_nothing_computed_changes(
    ranks: Pools, num_ranks: int, parallel: ParallelConfig, trainable: tuple[Part, ...], batching: Batching
) -> None:
    recipe = tiny_recipe(HD, parallel, global_batch_size=8, trainable=trainable)
    recipe = replace(recipe, train=replace(recipe.train, batching=batching, seq_length=1024))
    assert ranks(num_ranks).run(both_ways, recipe) == [(True, True, True, True)] * num_ranks


def device_bytes(rank: int, parallel: ParallelConfig, count: int) -> tuple[int, int, int]:
    """The most bytes of rows on the device in a schedule whose stage holds two micro-batches at a time.

    Then the bytes of the rows of the micro-batch that has most, and of all of them.
    """
    from megatron_deepstack.model.layers.injection import add_rows, put_rows
    from megatron_deepstack.routing.exchange import send_rows
    from megatron_deepstack.step.host_rows import HostRows, RowMemory
    from megatron_deepstack.testing.live_bytes import LiveBytes

    batches = [[one.planned(HD, 1000)] for one in tiny_samples(HD, count)]
    length = padded_length([one.sequence.length for batch in batches for one in batch], parallel)
    routes = plan_routes(HD, parallel, batches, [length] * len(batches), rank)
    table = torch.randn(routes.num_local_rows, WIDTH, generator=torch.Generator().manual_seed(rank))
    group, memory = dist.group.WORLD, RowMemory()
    assert group is not None
    order = forward_passes(parallel.pipeline, parallel.virtual_pipeline, count)
    received = HostRows(table, routes, group, memory, order, requires_grad=True)
    on_host = memory.blocks(1, [1], torch.float32)[0].untyped_storage()._cdata
    outputs: list[torch.Tensor] = []

    def counts(tensor: torch.Tensor) -> bool:
        return tensor.dim() > 1 and tensor.shape[-1] == WIDTH and tensor.untyped_storage()._cdata != on_host

    with LiveBytes(counts) as rows:
        for key in order:
            visual, hidden = received.of(*key), torch.zeros(length, 1, WIDTH)
            if visual.base_rows is not None:
                hidden = put_rows(hidden, visual.base_rows, visual.base_positions)
            for slot in range(0 if visual.slot_rows is None else len(visual.slot_rows)):
                hidden = add_rows(hidden, visual.slot_rows[slot], visual.slot_positions[slot])
            outputs += [hidden.sum()] if hidden.requires_grad else []  # a sample without images has no rows
            del visual, hidden
            if len(outputs) > 1:
                outputs.pop(0).backward()
        outputs.pop().backward()
    gradients = received.return_gradients(group)
    assert gradients.shape == table.shape
    each = [(len(chunk.base_rows) + chunk.slot_rows.size) * WIDTH * 4 for chunk in routes.chunks.values()]
    stored = send_rows(table, routes, group)
    return rows.peak - 8 * length * WIDTH * 4, max(each), stored.nbytes


@pytest.mark.parametrize("count", [8, 24])
def test_the_device_holds_a_few_micro_batches(ranks: Pools, count: int) -> None:
    """Two in flight, one on its way, and the gradients of one, whatever the number of micro-batches."""
    (peak, most, everything), *_ = ranks(1).run(device_bytes, ParallelConfig(), count)
    assert peak < 4.5 * most
    assert everything > count / 3 * most


def test_where_rows_rest() -> None:
    memory = 80 * 10**9
    assert [rest_on_host(one, int(2 * HOST_SHARE * memory), memory) for one in Switch] == [True, True, False]
    assert [rest_on_host(one, int(HOST_SHARE * memory / 2), memory) for one in Switch] == [False, True, False]
    assert not rest_on_host(Switch.AUTO, 10**12, None), "nobody knows what a CPU's memory has room for"
    assert not rest_on_host(Switch.ALWAYS, 0, memory), "a stage without rows"
