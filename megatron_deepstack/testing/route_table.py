"""The oracle of `planning.exchange.routes`: all ranks' routes at once, one table of all rows sorted by definition.

A row of the table is one delivered feature vector. The exchange's order is the table's: by destination, origin,
micro-batch and slot, then as samples, images and `rows.image_rows` list them. Made for tests: it costs every rank what
all ranks do, and sorts copies for each tp rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from megatron_deepstack.config.choices import EncoderPlacement
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig
from megatron_deepstack.planning.budget.cost import unit_flops
from megatron_deepstack.planning.exchange.route_sides import ChunkRows
from megatron_deepstack.planning.exchange.routes import EncodeUnit, PlannedSample, RankRoutes
from megatron_deepstack.planning.exchange.rows import BASE, NEWLINE, image_rows, unit_rows
from megatron_deepstack.planning.slots import EMBEDDING, chunk_slots, decoder_slots, owner, stage_chunks
from megatron_deepstack.planning.views import ImageShape, ViewGrid

Index = npt.NDArray[np.int64]
_ROW = np.dtype(
    [
        ("dst", np.int64),
        ("src", np.int64),
        ("micro_batch", np.int64),
        ("vpp", np.int64),
        ("slot", np.int64),
        ("position", np.int64),
        ("src_row", np.int64),
        ("returns", np.bool_),
        ("order", np.int64),
    ]
)


@dataclass(frozen=True, slots=True)
class StepRoutes:
    """The whole exchange of a step."""

    rows: np.ndarray
    """Structured array, one entry per delivered row, in the order of the exchange."""
    units: tuple[tuple[EncodeUnit, ...], ...]
    """Units by replica rank."""
    first_rows: tuple[tuple[int, ...], ...]
    """By replica rank the first local row of each of its units, and that of the newline."""
    slots_by_chunk: dict[tuple[int, int], tuple[int, ...]]
    """Decoder slots of each (pp, vpp)."""
    stage_of_rank: tuple[int, ...]
    returns: tuple[bool, ...]
    """By replica rank, whether gradients of received rows go back."""


def _plan_units(
    model: ModelConfig, micro_batches: Sequence[Sequence[PlannedSample]], num_ranks: int
) -> tuple[tuple[EncodeUnit, ...], ...]:
    """Deal the views that some row needs to ranks: in order and evenly, or the most costly first where costs differ."""
    units, costs = [], []
    for m, samples in enumerate(micro_batches):
        for b, sample in enumerate(samples):
            for span in sample.sequence.spans:
                rows = image_rows(model, sample.grids[span.image])
                kept = (rows.cell < span.length) & (rows.view != NEWLINE)
                for views in _unit_views(model, sample.grids[span.image], np.unique(rows.view[kept])):
                    shape = sample.grids[span.image]
                    grid = shape if isinstance(shape, ViewGrid) else None
                    units.append(EncodeUnit(micro_batch=m, sample=b, image=span.image, views=views, grid=grid))
                    costs.append(unit_flops(model, shape))
    if model.variant.traits.is_native and num_ranks > 1:
        return _most_costly_first(units, costs, num_ranks)
    bounds = [len(units) * rank // num_ranks for rank in range(num_ranks + 1)]
    return tuple(tuple(units[a:b]) for a, b in pairwise(bounds))


def _most_costly_first(
    units: Sequence[EncodeUnit], costs: Sequence[float], num_ranks: int
) -> tuple[tuple[EncodeUnit, ...], ...]:
    """Each unit to the rank that has least to do so far; a rank's units in the order of the step."""
    mine: list[list[int]] = [[] for _ in range(num_ranks)]
    for unit in sorted(range(len(units)), key=lambda u: -costs[u]):
        min(mine, key=lambda held: sum(costs[u] for u in held)).append(unit)
    return tuple(tuple(units[u] for u in sorted(held)) for held in mine)


def _unit_views(model: ModelConfig, grid: ImageShape, needed: Index) -> list[tuple[int, ...]]:
    if not len(needed):
        return []
    if model.variant.traits.stacks_in_vit:
        assert isinstance(grid, tuple)
        return [tuple(range(1 + grid[0] * grid[1]))]
    return [(int(view),) for view in needed]


def plan_table(
    model: ModelConfig,
    parallel: ParallelConfig,
    micro_batches: Sequence[Sequence[PlannedSample]],
    seq_length: int,
    segments: Sequence[tuple[int, ...]] | None = None,
) -> StepRoutes:
    """Route every row of a step.

    With `encoder_placement: inline` nothing travels: the ranks of stage 0 encode their own micro-batches, and every
    row's source is its destination.

    Args:
        model: The recipe's model.
        parallel: The layout.
        micro_batches: Those of one replica, all of one batch size.
        seq_length: Their common length in tokens.
        segments: For each micro-batch the ends of the pack's samples; None without packs.
    """
    ranks = parallel.tensor * parallel.context * parallel.pipeline
    inline = parallel.encoder_placement is EncoderPlacement.INLINE
    units = _plan_units(model, micro_batches, 1 if inline else ranks)
    first_rows = tuple(_rank_rows(model, micro_batches, mine) for mine in units)
    first_row = _homes(units, first_rows)
    newline_row = [starts[-1] for starts in first_rows]
    slots = decoder_slots(model)
    parts = [np.empty(0, _ROW)]
    for m, samples in enumerate(micro_batches):
        for b, sample in enumerate(samples):
            rows = _sample_rows(model, slots, sample, m, b, first_row, newline_row)
            ends = (seq_length,) if segments is None else segments[m]
            parts.append(_deliver(rows, model, parallel, b, len(samples), ends))
    table = np.concatenate(parts)
    table["order"] = np.arange(len(table))
    if inline:
        table["src"] = table["dst"]
        units = tuple(units[0] if rank < parallel.tensor * parallel.context else () for rank in range(ranks))
        first_rows = tuple(first_rows[0] if mine else (0,) for mine in units)
    table = table[np.lexsort([table[k] for k in ("slot", "vpp", "micro_batch", "src", "dst")])]
    chunks = stage_chunks(model.language.num_layers, parallel)
    return StepRoutes(
        rows=table,
        units=units,
        first_rows=first_rows,
        slots_by_chunk={(c.pp, c.vpp): chunk_slots(c, slots) for c in chunks},
        stage_of_rank=tuple(rank // (parallel.tensor * parallel.context) for rank in range(ranks)),
        returns=tuple(parallel.sequence_parallel or rank % parallel.tensor == 0 for rank in range(ranks)),
    )


_Home = tuple[int, int]


def _rank_rows(
    model: ModelConfig, micro_batches: Sequence[Sequence[PlannedSample]], mine: Sequence[EncodeUnit]
) -> tuple[int, ...]:
    """The first local row of each unit of one rank, and that of the newline."""
    counts = [unit_rows(model, micro_batches[u.micro_batch][u.sample].grids[u.image]) for u in mine]
    return tuple(accumulate(counts, initial=0))


def _homes(
    units: Sequence[Sequence[EncodeUnit]], first_rows: Sequence[Sequence[int]]
) -> dict[tuple[int, int, int, int], _Home]:
    """(micro-batch, sample, image, first view of the unit) -> (rank, first local row)."""
    return {
        (unit.micro_batch, unit.sample, unit.image, unit.views[0]): (rank, first_rows[rank][index])
        for rank, mine in enumerate(units)
        for index, unit in enumerate(mine)
    }


def _sample_rows(
    model: ModelConfig,
    slots: Sequence[int],
    sample: PlannedSample,
    m: int,
    b: int,
    first_row: dict[tuple[int, int, int, int], _Home],
    newline_row: Sequence[int],
) -> np.ndarray:
    """Rows of one sample with source, slot and position in the whole sequence; no destination yet."""
    slot_of_stack = np.array([EMBEDDING, *slots])
    parts = [np.empty(0, _ROW)]
    for span in sample.sequence.spans:
        rows = image_rows(model, sample.grids[span.image])
        kept = rows.cell < span.length
        out = np.zeros(int(kept.sum()), _ROW)
        if not len(out):
            continue
        view = rows.view[kept]
        homes = np.zeros((int(view.max()) + 2, 2), np.int64)
        for v in np.unique(view[view != NEWLINE]):
            homes[v] = first_row[m, b, span.image, int(v)]
        rank_of_first = homes[view[view != NEWLINE][0]][0]
        homes[NEWLINE] = rank_of_first, newline_row[rank_of_first]
        out["src"], out["src_row"] = homes[view, 0], homes[view, 1] + rows.token[kept]
        out["micro_batch"], out["position"] = m, span.start + rows.cell[kept]
        out["slot"] = slot_of_stack[rows.stack[kept] - BASE]
        parts.append(out)
    return np.concatenate(parts)


def _deliver(
    rows: np.ndarray, model: ModelConfig, parallel: ParallelConfig, b: int, batch: int, ends: tuple[int, ...]
) -> np.ndarray:
    """Fill in destination, virtual stage, shard position and who returns a gradient; copies for tp are added."""
    chunks = stage_chunks(model.language.num_layers, parallel)
    pp, vpp = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for slot in np.unique(rows["slot"]):
        home = chunks[owner(int(slot), chunks)]
        here = rows["slot"] == slot
        pp[here], vpp[here] = home.pp, home.vpp
    cp, local = _shard_context(rows["position"], parallel.context, ends)
    tp_shards = parallel.tensor if parallel.sequence_parallel else 1
    tp, local = np.divmod(local, ends[-1] // parallel.context // tp_shards)
    rows["vpp"], rows["position"] = vpp, local * batch + b
    rows["dst"] = tp + parallel.tensor * (cp + parallel.context * pp)
    rows["returns"] = True
    if parallel.sequence_parallel or parallel.tensor == 1:
        return rows
    copies = np.tile(rows, parallel.tensor)
    copies["dst"] += np.repeat(np.arange(parallel.tensor), len(rows))
    copies["returns"] = np.repeat(np.arange(parallel.tensor) == 0, len(rows))
    return copies


def _shard_context(position: Index, num_ranks: int, ends: tuple[int, ...]) -> tuple[Index, Index]:
    """Zigzag split of each sample: of 2 cp chunks, rank i holds chunks i and 2 cp - 1 - i.

    Returns (cp rank, position there), looked up in a table of all positions.
    """
    if num_ranks == 1:
        return np.zeros_like(position), position
    rank_of, place_of, held = np.empty(ends[-1], np.int64), np.empty(ends[-1], np.int64), [0] * num_ranks
    for begin, end in pairwise((0, *ends)):
        chunks = np.arange(begin, end).reshape(2 * num_ranks, -1)
        for rank in range(num_ranks):
            mine = np.concatenate([chunks[rank], chunks[2 * num_ranks - 1 - rank]])
            rank_of[mine], place_of[mine] = rank, held[rank] + np.arange(len(mine))
            held[rank] += len(mine)
    return rank_of[position], place_of[position]


def rank_routes(step: StepRoutes, rank: int) -> RankRoutes:
    """The part of the table that concerns one rank.

    Args:
        step: The whole exchange.
        rank: Number of the rank within its replica.

    Raises:
        AssertionError: A row but the newline has two gradients, or a row arrives where its slot is not.
    """
    rows, num_ranks = step.rows, len(step.units)
    sent = rows[rows["src"] == rank]
    received = rows[rows["dst"] == rank]
    backwards = sent[sent["returns"]]
    assert (received["returns"] == step.returns[rank]).all()
    num_local = step.first_rows[rank][-1] + 1
    assert not len(sent) or int(sent["src_row"].max()) < num_local, "a route names a row its rank does not make"
    uses = np.bincount(backwards["src_row"], minlength=num_local)
    assert uses[:-1].max(initial=0) <= 1, "a row other than the newline has two gradients"
    rows_of = {
        u: stop - first
        for units, starts in zip(step.units, step.first_rows, strict=True)
        for u, (first, stop) in zip(units, pairwise(starts), strict=True)
    }
    chunks, stored_rows = _chunk_rows(step, received, step.stage_of_rank[rank])
    return RankRoutes(
        units=step.units[rank],
        first_rows=np.array(step.first_rows[rank]),
        num_units=len(rows_of),
        grids=(),
        imbalance=1.0,
        num_replica_rows=sum(rows_of.values()),
        num_local_rows=num_local,
        send_rows=np.ascontiguousarray(sent["src_row"]),
        send_splits=_counts(sent["dst"], num_ranks),
        receive_splits=_counts(received["src"], num_ranks),
        stored_rows=stored_rows,
        returns_gradients=step.returns[rank],
        returned_rows=np.ascontiguousarray(backwards["src_row"]),
        returned_splits=_counts(backwards["dst"], num_ranks),
        chunks=chunks,
    )


def _counts(ranks: Index, num_ranks: int) -> tuple[int, ...]:
    return tuple(int(n) for n in np.bincount(ranks, minlength=num_ranks))


def _chunk_rows(
    step: StepRoutes, received: np.ndarray, stage: int
) -> tuple[dict[tuple[int, int], ChunkRows], npt.NDArray[np.int64]]:
    chunks, stored = {}, [np.empty(0, np.int64)]
    keys = np.unique(received[["micro_batch", "vpp"]]) if len(received) else ()
    for m, vpp in keys:
        first = sum(map(len, stored))
        here = np.flatnonzero((received["micro_batch"] == m) & (received["vpp"] == vpp))
        here = here[np.argsort(received["order"][here])]
        by_slot = [here[received["slot"][here] == slot] for slot in (EMBEDDING, *step.slots_by_chunk[stage, int(vpp)])]
        base, stacked = by_slot[0], by_slot[1:]
        assert sum(map(len, by_slot)) == len(here), "a row arrived at a stage that does not own its slot"
        longest = max(map(len, stacked), default=0)
        rows = np.full((len(stacked), longest), len(received), np.int64)
        positions = np.zeros((len(stacked), longest), np.int64)
        for k, indices in enumerate(stacked):
            rows[k, : len(indices)] = indices
            positions[k, : len(indices)] = received["position"][indices]
        stored += [base, rows.reshape(-1)]
        chunks[int(m), int(vpp)] = ChunkRows(
            first=first,
            base_rows=base,
            base_positions=received["position"][base],
            slot_rows=rows,
            slot_positions=positions,
        )
    return chunks, np.concatenate(stored)
