"""Every row reaches exactly the layer, rank and position it belongs to, for random samples, slots and layouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_deepstack.config.choices import EncoderPlacement, Sampler, Variant
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, StackConfig
from megatron_deepstack.config.sizes import sample_multiple
from megatron_deepstack.planning.batch.packing import filler, merge
from megatron_deepstack.planning.batch.sequence import padded_length
from megatron_deepstack.planning.exchange.routes import PlannedSample, RankRoutes, plan_routes
from megatron_deepstack.planning.exchange.rows import BASE, NEWLINE, image_rows, tokens_per_view, unit_rows
from megatron_deepstack.planning.slots import EMBEDDING, chunk_slots, decoder_slots, stage_chunks
from megatron_deepstack.testing.route_table import plan_table, rank_routes
from megatron_deepstack.testing.tiny import tiny_model, tiny_qwen3_vl, tiny_samples

Delivered = Counter[tuple[int, int, int, int, int, int, int]]
"""(micro-batch, sample, slot, position, image, view, token) and how often it was added, all tp ranks counted."""

cropping = st.builds(
    lambda variant, sampler, slots: tiny_model(variant=variant, stacks=StackConfig(sampler=sampler, slots=slots)),
    st.sampled_from([Variant.DEEPSTACK_L, Variant.DEEPSTACK_HD, Variant.LLAVA, Variant.LLAVA_ANYRES]),
    st.sampled_from(list(Sampler)),
    st.tuples(*[st.integers(0, 7)] * 4),
)
native = st.builds(
    lambda taps, slots: tiny_qwen3_vl(
        vision=replace(tiny_qwen3_vl().vision, taps=taps), stacks=StackConfig(slots=slots[: len(taps)])
    ),
    st.sampled_from([(), (2,), (0, 2), (3, 1, 0)]),
    st.tuples(*[st.integers(0, 7)] * 3),
)
models = st.one_of(cropping, native)
layouts = st.builds(
    ParallelConfig,
    tensor=st.sampled_from([1, 2]),
    pipeline=st.sampled_from([1, 2, 4]),
    virtual_pipeline=st.sampled_from([1, 2]),
    context=st.sampled_from([1, 2]),
    sequence_parallel=st.booleans(),
)


def plan_all(
    model: ModelConfig,
    parallel: ParallelConfig,
    batches: Sequence[Sequence[PlannedSample]],
    length: int,
    segments: Sequence[tuple[int, ...]] | None = None,
) -> list[RankRoutes]:
    """Each rank's own plan."""
    ranks = parallel.tensor * parallel.context * parallel.pipeline
    return [plan_routes(model, parallel, batches, [length] * len(batches), rank, segments) for rank in range(ranks)]


def expected_rows(model: ModelConfig, batches: list[list[PlannedSample]]) -> Delivered:
    """What must be added, from the definition alone."""
    slots = decoder_slots(model)
    rows: Delivered = Counter()
    for m, batch in enumerate(batches):
        for b, sample in enumerate(batch):
            for span in sample.sequence.spans:
                image = image_rows(model, sample.grids[span.image])
                for stack, cell, view, token in zip(image.stack, image.cell, image.view, image.token, strict=True):
                    position = span.start + int(cell)
                    if position < sample.sequence.length:
                        slot = EMBEDDING if stack == BASE else slots[stack]
                        source = (-1, NEWLINE, 0) if view == NEWLINE else (span.image, int(view), int(token))
                        rows[m, b, slot, position, *source] += 1
    return rows


def exchange(routes: list[RankRoutes], model: ModelConfig) -> list[list[tuple[int, ...]]]:
    """Carry out the plan with names for rows: what each rank receives, in order of arrival."""
    tables = []
    for mine in routes:
        table: list[tuple[int, ...]] = []
        for unit in mine.units:
            first = unit.views[0]
            table += [
                (unit.micro_batch, unit.sample, unit.image, first, t)
                for t in range(unit_rows(model, unit.grid) if unit.grid else tokens_per_view(model.vision))
            ]
        tables.append([*table, (-1, -1, -1, NEWLINE, 0)])
    outgoing = []
    for rank, mine in enumerate(routes):
        named = [tables[rank][row] for row in mine.send_rows]
        outgoing.append(np.split(np.array(named, dtype=object).reshape(-1, 5), np.cumsum(mine.send_splits)[:-1]))
    received = []
    for rank, mine in enumerate(routes):
        parts = [outgoing[source][rank] for source in range(len(routes))]
        assert tuple(map(len, parts)) == mine.receive_splits
        received.append([tuple(row) for part in parts for row in part])
    return received


def global_position(local: int, batch: int, length: int, parallel: ParallelConfig, tp: int, cp: int) -> tuple[int, int]:
    """(position in the whole sequence, sample) of a rank's flat position, from the definitions of zigzag and shards."""
    s, b = divmod(local, batch)
    if parallel.sequence_parallel:
        s += tp * (length // parallel.context // parallel.tensor)
    if parallel.context == 1:
        return s, b
    size = length // (2 * parallel.context)
    chunk = cp if s < size else 2 * parallel.context - 1 - cp
    return chunk * size + s % size, b


def delivered_rows(
    model: ModelConfig, parallel: ParallelConfig, routes: list[RankRoutes], batch: int, length: int
) -> Delivered:
    rows: Delivered = Counter()
    chunks = {(c.pp, c.vpp): c for c in stage_chunks(model.language.num_layers, parallel)}
    for rank, arrived in enumerate(exchange(routes, model)):
        tp, rest = rank % parallel.tensor, rank // parallel.tensor
        cp, pp = rest % parallel.context, rest // parallel.context
        for (m, vpp), chunk in routes[rank].chunks.items():
            slots = chunk_slots(chunks[pp, vpp], decoder_slots(model))
            added = [(EMBEDDING, r, p) for r, p in zip(chunk.base_rows, chunk.base_positions, strict=True)]
            assert not added or chunks[pp, vpp].has_embedding
            for index, slot in enumerate(slots):
                added += [
                    (slot, r, p)
                    for r, p in zip(chunk.slot_rows[index], chunk.slot_positions[index], strict=True)
                    if r != len(arrived)
                ]
            for slot, row, local in added:
                position, b = global_position(int(local), batch, length, parallel, tp, cp)
                source_m, source_b, image, view, token = arrived[row]
                if view != NEWLINE:
                    assert (source_m, source_b) == (m, b)
                rows[m, b, slot, position, image, view, token] += 1
    return rows


@settings(max_examples=25)
@given(model=models, parallel=layouts, batch=st.sampled_from([1, 2]), seed=st.integers(0, 99), cut=st.booleans())
def test_rows_arrive_where_they_belong(
    model: ModelConfig, parallel: ParallelConfig, batch: int, seed: int, cut: bool
) -> None:
    """The plan, carried out in numpy, adds each row once on each tp rank that holds its position."""
    samples = tiny_samples(model, 4, seed)
    planned = [s.planned(model, 23 if cut else 1000, truncate=cut) for s in samples]
    batches = [planned[i : i + batch] for i in range(0, 4, batch)]
    length = padded_length([s.sequence.length for s in planned], parallel)
    routes = plan_all(model, parallel, batches, length)
    copies = 1 if parallel.sequence_parallel else parallel.tensor
    expected = Counter({key: count * copies for key, count in expected_rows(model, batches).items()})
    assert delivered_rows(model, parallel, routes, batch, length) == expected


@settings(max_examples=25)
@given(model=models, parallel=layouts, seed=st.integers(0, 99))
def test_each_row_returns_one_gradient(model: ModelConfig, parallel: ParallelConfig, seed: int) -> None:
    """Gradients going back: as many as arrive, and one for each row and place, however many tp ranks added it."""
    batches = [[s.planned(model, 1000)] for s in tiny_samples(model, 3, seed)]
    length = padded_length([s.sequence.length for b in batches for s in b], parallel)
    routes = plan_all(model, parallel, batches, length)
    for source, sender in enumerate(routes):
        for target, receiver in enumerate(routes):
            assert receiver.return_splits[source] == sender.returned_splits[target]
    assert sum(sum(mine.return_splits) for mine in routes) == sum(expected_rows(model, batches).values())


@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_views_are_dealt_evenly(num_samples: int) -> None:
    """No rank encodes more than one view above another."""
    model, parallel = tiny_model(), ParallelConfig(pipeline=4)
    batches = [[s.planned(model, 1000)] for s in tiny_samples(model, num_samples)]
    routes = plan_all(model, parallel, batches, 512)
    counts = [len(mine.units) for mine in routes]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == len(plan_routes(model, ParallelConfig(), batches, [512] * num_samples, 0).units)
    assert {mine.num_units for mine in routes} == {sum(counts)}


def test_inline_sends_nothing() -> None:
    """The baseline: every row's source is its destination, and later stages encode nothing."""
    model = tiny_model(stacks=StackConfig(slots=(0, 0, 1, 1)))
    parallel = ParallelConfig(pipeline=2, encoder_placement=EncoderPlacement.INLINE)
    routes = plan_all(model, parallel, [[s.planned(model, 1000)] for s in tiny_samples(model, 2)], 512)
    for rank, mine in enumerate(routes):
        assert sum(mine.send_splits) == mine.send_splits[rank]
        assert mine.receive_splits == mine.send_splits
    assert len(routes[0].units) > 0
    assert len(routes[1].units) == 0
    assert routes[1].num_units == len(routes[0].units)


any_layout = st.builds(
    ParallelConfig,
    tensor=st.sampled_from([1, 2, 3]),
    pipeline=st.sampled_from([1, 2, 4]),
    virtual_pipeline=st.sampled_from([1, 2]),
    context=st.sampled_from([1, 2, 3]),
    sequence_parallel=st.booleans(),
)
inline_layout = st.builds(
    ParallelConfig,
    tensor=st.sampled_from([1, 2]),
    pipeline=st.sampled_from([1, 2]),
    context=st.sampled_from([1, 2]),
    sequence_parallel=st.booleans(),
    encoder_placement=st.just(EncoderPlacement.INLINE),
)


@st.composite
def steps(draw: st.DrawFn) -> tuple[ModelConfig, ParallelConfig, list[list[PlannedSample]]]:
    """A model, a layout and a step: samples without, with one or with several images, cut or whole, in batches or
    packs, some of them empty."""
    parallel = draw(st.one_of(any_layout, inline_layout))
    inline = parallel.encoder_placement is EncoderPlacement.INLINE
    first_stage = 8 // parallel.pipeline // parallel.virtual_pipeline - 1
    variant = draw(st.sampled_from([one for one in Variant if one.traits.has_base_rows]))
    slots = draw(st.tuples(*[st.integers(0, first_stage if inline else 7)] * 4))
    sampler = draw(st.sampled_from(list(Sampler)))
    if variant.traits.is_native:
        model = tiny_qwen3_vl(stacks=StackConfig(slots=slots[:2]))
    else:
        model = tiny_model(variant=variant, stacks=StackConfig(sampler=sampler, slots=slots))
    cut = draw(st.one_of(st.none(), st.integers(1, 60)))
    samples = tiny_samples(model, draw(st.integers(1, 5)), draw(st.integers(0, 99)))
    planned = [s.planned(model, cut or 1000, truncate=cut is not None) for s in samples]
    for place in draw(st.sets(st.integers(0, len(planned) - 1))):
        planned[place] = filler()
    if draw(st.booleans()):
        bound = draw(st.integers(0, len(planned)))
        return model, parallel, [[merge(pack)] for pack in (planned[:bound], planned[bound:]) if pack]
    size = draw(st.integers(1, 2))
    planned += [filler()] * (-len(planned) % size)
    return model, parallel, [planned[i : i + size] for i in range(0, len(planned), size)]


def assert_same(found: RankRoutes, expected: RankRoutes) -> None:
    for name in (
        "units",
        "num_units",
        "num_replica_rows",
        "num_local_rows",
        "send_splits",
        "receive_splits",
        "returned_splits",
    ):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.return_splits == expected.return_splits
    for name in ("first_rows", "send_rows", "returned_rows", "stored_rows"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    assert list(found.chunks) == list(expected.chunks)
    for key, chunk in found.chunks.items():
        assert chunk.first == expected.chunks[key].first
        for name in ("base_rows", "base_positions", "slot_rows", "slot_positions"):
            np.testing.assert_array_equal(getattr(chunk, name), getattr(expected.chunks[key], name), f"{key} {name}")


@settings(max_examples=60)
@given(step=steps())
def test_local_plans_are_the_whole_table(step: tuple[ModelConfig, ParallelConfig, list[list[PlannedSample]]]) -> None:
    """What ranks plan for themselves alone is what one table of all rows gives each of them."""
    model, parallel, batches = step
    length = padded_length([s.sequence.length for batch in batches for s in batch], parallel)
    table = plan_table(model, parallel, batches, length)
    for rank, mine in enumerate(plan_all(model, parallel, batches, length)):
        assert_same(mine, rank_routes(table, rank))


@settings(max_examples=40)
@given(parallel=any_layout, lots=st.lists(st.integers(1, 4), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_packs_are_divided_sample_by_sample(parallel: ParallelConfig, lots: list[int], seed: int) -> None:
    """Each rank's plan of packs under context parallelism is what a table of all positions gives it."""
    model = tiny_model(variant=Variant.DEEPSTACK_HD, stacks=StackConfig(slots=(0, 2, 5, 7)))
    samples = [s.planned(model, 1000) for s in tiny_samples(model, sum(lots), seed)]
    batches = [[merge([samples.pop() for _ in range(lot)], sample_multiple(parallel))] for lot in lots]
    length = padded_length([row.sequence.length for (row,) in batches], parallel)
    ends = [row.sequence.ends for (row,) in batches]
    segments = [one if one[-1] == length else (*one, length) for one in ends]
    table = plan_table(model, parallel, batches, length, segments)
    for rank, mine in enumerate(plan_all(model, parallel, batches, length, segments)):
        assert_same(mine, rank_routes(table, rank))


@settings(max_examples=25)
@given(step=steps())
def test_chunks_share_out_the_stored_rows(step: tuple[ModelConfig, ParallelConfig, list[list[PlannedSample]]]) -> None:
    """Stretches follow each other without a gap, and each received row is stored once."""
    model, parallel, batches = step
    length = padded_length([s.sequence.length for batch in batches for s in batch], parallel)
    for mine in plan_all(model, parallel, batches, length):
        begin = 0
        for chunk in mine.chunks.values():
            assert chunk.first == begin
            begin += len(chunk.base_rows) + chunk.slot_rows.size
        assert begin == len(mine.stored_rows)
        received = mine.stored_rows[mine.stored_rows < mine.num_received]
        assert sorted(received.tolist()) == list(range(mine.num_received))
