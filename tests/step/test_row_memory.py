"""How many copies of a step's rows a rank holds at once, and that windows of the exchange change no number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megatron_deepstack.config.choices import Variant
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, StackConfig
from megatron_deepstack.planning.batch.sequence import padded_length
from megatron_deepstack.planning.exchange.routes import RankRoutes, plan_routes
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_model, tiny_samples

Pools = Callable[[int], RankPool]
WIDTH = 96
MODEL = tiny_model(variant=Variant.DEEPSTACK_HD, stacks=StackConfig(slots=(0, 1, 2, 3)))


def routes_of(parallel: ParallelConfig, rank: int, model: ModelConfig = MODEL) -> tuple[RankRoutes, int]:
    batches = [[s.planned(model, 1000)] for s in tiny_samples(model, 24)]
    length = padded_length([s.sequence.length for batch in batches for s in batch], parallel)
    return plan_routes(model, parallel, batches, [length] * len(batches), rank), length


def run_step(rank: int, parallel: ParallelConfig, window_bytes: int) -> tuple[torch.Tensor, list[float], list[float]]:
    """A step whose decoder adds each row to hidden states and multiplies them.

    Returns the gradients of this rank's table, and the most bytes of rows alive at once, in copies of the rows that the
    rank receives or makes, whichever is more: while rows are sent, in the schedule, and while gradients are returned;
    then the same as `row_bytes` predicts them.
    """
    from megatron_deepstack.model.layers.injection import add_rows, put_rows
    from megatron_deepstack.planning.budget import received_rows
    from megatron_deepstack.routing import exchange
    from megatron_deepstack.step.visual import ReceivedRows
    from megatron_deepstack.testing.live_bytes import LiveBytes

    routes, length = routes_of(parallel, rank)
    table = torch.randn(routes.num_local_rows, WIDTH, generator=torch.Generator().manual_seed(rank))
    window = received_rows.WINDOW_BYTES
    received_rows.WINDOW_BYTES = window_bytes  # type: ignore[misc]
    group = dist.group.WORLD
    assert group is not None
    peaks = []
    try:
        with LiveBytes(lambda tensor: tensor.dim() > 1 and tensor.shape[-1] > 1) as rows:
            received = ReceivedRows(exchange.send_rows(table, routes, group), routes, requires_grad=True)
            peaks.append(rows.peak)
            del table
            rows.peak = rows.now
            for m, vpp in routes.chunks:
                visual = received.of(m, vpp)
                hidden = torch.zeros(length, 1, WIDTH)
                if visual.base_rows is not None:
                    hidden = put_rows(hidden, visual.base_rows, visual.base_positions)
                for slot in range(0 if visual.slot_rows is None else len(visual.slot_rows)):
                    hidden = 1.5 * add_rows(hidden, visual.slot_rows[slot], visual.slot_positions[slot])
                hidden.backward(torch.linspace(-1, 1, hidden.numel()).view_as(hidden))
                del hidden, visual
            peaks.append(rows.peak)
            rows.peak = rows.now
            grads = exchange.return_gradients(received.take_gradients(), routes, group)
            peaks.append(rows.peak)
        predicted = received_rows.row_bytes(
            local_rows=routes.num_local_rows,
            sent_rows=sum(routes.send_splits),
            stored_rows=len(routes.stored_rows),
            replica_rows=routes.num_replica_rows,
            micro_batches=len(routes.chunks),
            hidden_size=WIDTH,
            element_bytes=4,
        )
    finally:
        received_rows.WINDOW_BYTES = window  # type: ignore[misc]
    copy = max(routes.num_received, routes.num_local_rows) * WIDTH * 4
    shares = [peak / copy for peak in peaks]
    return grads, shares, [b / copy for b in (predicted.sending, predicted.schedule, predicted.returning)]


LAYOUTS = {"one": ParallelConfig(), "pp2": ParallelConfig(pipeline=2), "tp2": ParallelConfig(tensor=2)}


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_are_held_once(ranks: Pools, parallel: ParallelConfig) -> None:
    """One copy of the received rows, which their gradients overwrite, and a window or two; nothing else that grows."""
    num_ranks = parallel.tensor * parallel.pipeline
    results = ranks(num_ranks).run(run_step, parallel, 1)
    local = 1 / num_ranks  # rows that the rank made or whose gradients it gets, in copies of what rank 0 receives
    sending, schedule, returning = results[0][1]
    # Measured, the local table taken off: sending 1.10 to 1.27, returning 1.10 to 1.21 (gloo's thread may let go of a
    # window later, which is 1/16); the schedule 1.30 with its hidden states. Four copies were held where leaves, their
    # gradients and tables stood side by side.
    assert sending < 1.4 + local
    assert schedule < 1.4
    assert returning < 1.3 + local


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
def test_row_bytes_are_those_that_a_step_takes(ranks: Pools, parallel: ParallelConfig) -> None:
    """The arithmetic that plans a run's memory, against what is alive in a step, on every rank."""
    for _, measured, predicted in ranks(parallel.tensor * parallel.pipeline).run(run_step, parallel, 1):
        sending, schedule, returning = (m - p for m, p in zip(measured, predicted, strict=True))
        # Measured: sending 0 to 0.07 above the arithmetic, returning -0.04 to 0.13, since gloo's thread may let go of a
        # window (1/16 of a copy) a little later; the schedule 0.25, which is this test's hidden states.
        assert -0.07 < sending < 0.2
        assert 0 <= schedule < 0.3
        assert -0.07 < returning < 0.2


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
def test_windows_change_no_gradient(ranks: Pools, parallel: ParallelConfig) -> None:
    """Exchanged in sixteen windows or in one."""
    num_ranks = parallel.tensor * parallel.pipeline
    many, one = (ranks(num_ranks).run(run_step, parallel, size) for size in (1, 1 << 40))
    for (windowed, *_), (whole, *_) in zip(many, one, strict=True):
        torch.testing.assert_close(windowed, whole, rtol=1e-6, atol=1e-6)
        assert whole.abs().max() > 0
