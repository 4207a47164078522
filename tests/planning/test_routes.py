"""Every row reaches exactly the layer, rank and position it belongs to, for random samples, slots and layouts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_deepstack.config.choices import EncoderPlacement, Sampler, Variant
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, StackConfig
from megatron_deepstack.planning.routes import PlannedSample, RankRoutes, StepRoutes, plan_routes, rank_routes
from megatron_deepstack.planning.rows import BASE, NEWLINE, image_rows, tokens_per_view
from megatron_deepstack.planning.sequence import padded_length
from megatron_deepstack.planning.slots import EMBEDDING, decoder_slots, stage_chunks
from megatron_deepstack.testing.tiny import tiny_model, tiny_samples

Delivered = Counter[tuple[int, int, int, int, int, int, int]]
"""(micro-batch, sample, slot, position, image, view, token) and how often it was added, all tp ranks counted."""

models = st.builds(
    lambda variant, sampler, slots: tiny_model(variant=variant, stacks=StackConfig(sampler=sampler, slots=slots)),
    st.sampled_from([Variant.DEEPSTACK_L, Variant.DEEPSTACK_HD, Variant.LLAVA, Variant.LLAVA_ANYRES]),
    st.sampled_from(list(Sampler)),
    st.tuples(*[st.integers(0, 7)] * 4),
)
layouts = st.builds(
    ParallelConfig,
    tensor=st.sampled_from([1, 2]),
    pipeline=st.sampled_from([1, 2, 4]),
    virtual_pipeline=st.sampled_from([1, 2]),
    context=st.sampled_from([1, 2]),
    sequence_parallel=st.booleans(),
)


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


def exchange(step: StepRoutes, routes: list[RankRoutes], model: ModelConfig) -> list[list[tuple[int, ...]]]:
    """Carry out the plan with names for rows: what each rank receives, in order of arrival."""
    tables = []
    for mine in routes:
        table: list[tuple[int, ...]] = []
        for unit in mine.units:
            first = unit.views[0]
            table += [
                (unit.micro_batch, unit.sample, unit.image, first, t) for t in range(tokens_per_view(model.vision))
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
    model: ModelConfig, parallel: ParallelConfig, step: StepRoutes, batch: int, length: int
) -> Delivered:
    num_ranks = parallel.tensor * parallel.context * parallel.pipeline
    routes = [rank_routes(step, rank) for rank in range(num_ranks)]
    rows: Delivered = Counter()
    chunks = {(c.pp, c.vpp): c for c in stage_chunks(model.language.num_layers, parallel)}
    for rank, arrived in enumerate(exchange(step, routes, model)):
        tp, rest = rank % parallel.tensor, rank // parallel.tensor
        cp, pp = rest % parallel.context, rest // parallel.context
        for (m, vpp), chunk in routes[rank].chunks.items():
            slots = step.slots_by_chunk[pp, vpp]
            assert all(chunks[pp, vpp].owns(slot) for slot in slots)
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


@settings(max_examples=40, deadline=None)
@given(model=models, parallel=layouts, batch=st.sampled_from([1, 2]), seed=st.integers(0, 99), cut=st.booleans())
def test_rows_arrive_where_they_belong(
    model: ModelConfig, parallel: ParallelConfig, batch: int, seed: int, cut: bool
) -> None:
    """The plan, carried out in numpy, adds each row once on each tp rank that holds its position."""
    samples = tiny_samples(model, 4, seed)
    planned = [s.planned(model, 23 if cut else 1000, truncate=cut) for s in samples]
    batches = [planned[i : i + batch] for i in range(0, 4, batch)]
    length = padded_length([s.sequence.length for s in planned], parallel)
    step = plan_routes(model, parallel, batches, length)
    copies = 1 if parallel.sequence_parallel else parallel.tensor
    expected = Counter({key: count * copies for key, count in expected_rows(model, batches).items()})
    assert delivered_rows(model, parallel, step, batch, length) == expected


@settings(max_examples=25, deadline=None)
@given(model=models, parallel=layouts, seed=st.integers(0, 99))
def test_each_row_returns_one_gradient(model: ModelConfig, parallel: ParallelConfig, seed: int) -> None:
    """Gradients going back: as many as arrive, and one for each row and place, however many tp ranks added it."""
    batches = [[s.planned(model, 1000)] for s in tiny_samples(model, 3, seed)]
    length = padded_length([s.sequence.length for b in batches for s in b], parallel)
    step = plan_routes(model, parallel, batches, length)
    routes = [rank_routes(step, rank) for rank in range(len(step.units))]
    for source, sender in enumerate(routes):
        for target, receiver in enumerate(routes):
            assert receiver.return_splits[source] == sender.returned_splits[target]
    assert sum(len(mine.return_rows) for mine in routes) == sum(expected_rows(model, batches).values())


@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_views_are_dealt_evenly(num_samples: int) -> None:
    """No rank encodes more than one view above another."""
    model, parallel = tiny_model(), ParallelConfig(pipeline=4)
    batches = [[s.planned(model, 1000)] for s in tiny_samples(model, num_samples)]
    step = plan_routes(model, parallel, batches, 512)
    counts = [len(units) for units in step.units]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == sum(len(u) for u in plan_routes(model, ParallelConfig(), batches, 512).units)


def test_inline_sends_nothing() -> None:
    """The baseline: every row's source is its destination, and later stages encode nothing."""
    model = tiny_model(stacks=StackConfig(slots=(0, 0, 1, 1)))
    parallel = ParallelConfig(pipeline=2, encoder_placement=EncoderPlacement.INLINE)
    step = plan_routes(model, parallel, [[s.planned(model, 1000)] for s in tiny_samples(model, 2)], 512)
    assert (step.rows["src"] == step.rows["dst"]).all()
    assert len(step.units[0]) > 0
    assert len(step.units[1]) == 0
