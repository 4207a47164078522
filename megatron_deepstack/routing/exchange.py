"""The exchange of a step: rows to the ranks that add them, and their gradients back to the ranks that made them.

Both directions are `all_to_all_single` with uneven splits on the replica's own group. Every rank calls both in every
step, with zero-length splits where it has nothing to send, so a step without images cannot hang the others. No call is
made inside the pipeline schedule.

Rows of many micro-batches are most of what a first stage holds, so each direction works in *windows* of columns: only a
window is ever gathered, received and put in its place beside the one copy that stays. A small step is one window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import torch
import torch.distributed as dist

from megatron_deepstack.planning.exchange.routes import RankRoutes
from megatron_deepstack.platform.compute.upload import upload

WINDOW_BYTES: Final = 256 << 20
"""Bytes of a step's rows, over all ranks of the replica, that one window holds; a rank has at most about two windows
beside its rows."""
MOST_WINDOWS: Final = 16
"""With more, the pieces of a row would be too short to copy quickly; they are 512 bytes at hidden size 4,096."""


def send_rows(table: torch.Tensor, routes: RankRoutes, group: dist.ProcessGroup) -> torch.Tensor:
    """Deliver rows of every rank's table to the ranks that add them.

    Collective over the replica. No gradient flows through it: `return_gradients` is its reverse.

    Args:
        table: (num_local_rows, H), the rows that this rank made, the newline last.
        routes: This rank's side of the exchange.
        group: The replica's ranks.

    Returns:
        (len(stored_rows), H) the received rows in the order of `routes.stored_rows`, padding zero.
    """
    table = table.detach()
    stored = table.new_empty(len(routes.stored_rows), table.shape[1])
    sending, storing = _index(routes.send_rows, table), _index(routes.stored_rows, table)
    for columns in _windows(routes, table):
        outgoing = table[:, columns].index_select(0, sending)
        received = outgoing.new_empty(routes.num_received + 1, outgoing.shape[1])
        received[-1].zero_()
        _all_to_all(received[:-1], outgoing, routes.receive_splits, routes.send_splits, group)
        stored[:, columns] = received.index_select(0, storing)
    return stored


def return_gradients(grads: torch.Tensor, routes: RankRoutes, group: dist.ProcessGroup) -> torch.Tensor:
    """Send gradients of received rows home.

    Collective over the replica. Every row comes back once (where several tp ranks added the same row, the plan lets one
    of them answer) but the newline, which ends each row of each mosaic: its gradients, hundreds, are summed in float32,
    since a bf16 sum loses what is 256 times smaller, and CUDA's takes its terms in any order.

    Args:
        grads: (len(stored_rows), H) gradients in the order of `routes.stored_rows`; those of padding are not looked at.
        routes: This rank's side of the exchange.
        group: The replica's ranks.

    Returns:
        (num_local_rows, H) gradients of this rank's table.
    """
    table = grads.new_zeros(routes.num_local_rows, grads.shape[1])
    arriving = _index(routes.returned_rows, grads)
    newlines = _index(np.flatnonzero(routes.returned_rows == routes.num_local_rows - 1), grads)
    sending = _places_by_arrival(routes, grads)
    for columns in _windows(routes, grads):
        outgoing = grads[:, columns].index_select(0, sending)
        incoming = outgoing.new_empty(sum(routes.returned_splits), outgoing.shape[1])
        _all_to_all(incoming, outgoing, routes.returned_splits, routes.return_splits, group)
        table[:, columns].index_copy_(0, arriving, incoming)
        table[-1, columns] = incoming.index_select(0, newlines).sum(0, dtype=torch.float32)
    return table


def _places_by_arrival(routes: RankRoutes, like: torch.Tensor) -> torch.Tensor:
    """Where each received row is stored, in the order of arrival; none where this rank returns no gradient."""
    if not routes.returns_gradients:
        return torch.empty(0, dtype=torch.int64, device=like.device)
    stored = _index(routes.stored_rows, like)
    places = torch.empty(routes.num_received + 1, dtype=torch.int64, device=like.device)
    places[stored] = torch.arange(len(stored), device=like.device)  # all padding goes to the last one
    return places[:-1]


def _windows(routes: RankRoutes, table: torch.Tensor) -> Iterator[slice]:
    """Columns to exchange together; the same on all ranks of the replica."""
    width = table.shape[1]
    total = routes.num_replica_rows * width * table.element_size()
    count = max(1, min(MOST_WINDOWS, -(-total // WINDOW_BYTES), width))
    bounds = [width * k // count for k in range(count + 1)]
    return (slice(first, stop) for first, stop in pairwise(bounds))


def _index(rows: object, like: torch.Tensor) -> torch.Tensor:
    index = torch.as_tensor(rows, dtype=torch.int64)
    return index if like.device.type == "cpu" else upload(index)


def _all_to_all(
    output: torch.Tensor,
    input_: torch.Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    group: dist.ProcessGroup,
) -> None:
    if dist.get_world_size(group) == 1:
        output.copy_(input_)
        return
    dist.all_to_all_single(output, input_.contiguous(), list(output_splits), list(input_splits), group=group)
