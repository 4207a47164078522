"""The exchange of a step: rows go to the ranks that add them, and gradients return to the ranks that made the rows.

Both directions are `all_to_all_single` with uneven splits on the process group of the replica. Every rank calls both in
every step, with splits of length zero if it has nothing to send, so a step without images cannot make other ranks hang.
No call is made inside the pipeline schedule.

The rows of many micro-batches take most of the memory of a first stage. So each direction works in *windows* of
columns: temporary copies hold only one window at a time, beside the result. A small step is one window.

Legend: H is the hidden size of the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist

from megatron_deepstack.planning.budget import received_rows
from megatron_deepstack.planning.exchange.routes import RankRoutes
from megatron_deepstack.platform.compute.upload import upload


def send_rows(table: torch.Tensor, routes: RankRoutes, group: dist.ProcessGroup) -> torch.Tensor:
    """Deliver rows of every rank's table to the ranks that add them.

    Collective over the replica. Autograd does not pass through this function; `return_gradients` is its reverse.

    Args:
        table: (num_local_rows, H), the rows that this rank made, with the newline as the last row. Any float dtype.
        routes: This rank's side of the exchange.
        group: The ranks of the replica.

    Returns:
        (len(stored_rows), H) in the dtype of `table`: the received rows in the order of `routes.stored_rows`. Rows of
        padding are zero.
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
    """Return the gradients of received rows to the ranks that made the rows.

    Collective over the replica. Every row except the newline has one gradient: if several tp ranks added the same row,
    the plan makes only one of them return it. The newline ends each line of each mosaic, so it has hundreds of
    gradients. They are summed in float32, since a bf16 sum loses terms that are 256 times smaller, and a sum on CUDA
    adds its terms in no fixed order.

    Args:
        grads: (len(stored_rows), H) gradients in the order of `routes.stored_rows`. Those of padding are ignored.
        routes: This rank's side of the exchange.
        group: The ranks of the replica.

    Returns:
        (num_local_rows, H) in the dtype of `grads`: the gradients of this rank's table.
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
    """Return where each received row is stored, in the order of arrival; empty if this rank returns no gradient."""
    if not routes.returns_gradients:
        return torch.empty(0, dtype=torch.int64, device=like.device)
    stored = _index(routes.stored_rows, like)
    places = torch.empty(routes.num_received + 1, dtype=torch.int64, device=like.device)
    places[stored] = torch.arange(len(stored), device=like.device)  # all padding goes to the last entry
    return places[:-1]


def _windows(routes: RankRoutes, table: torch.Tensor) -> Iterator[slice]:
    """Return the ranges of columns that are exchanged together, which are the same on all ranks of the replica."""
    width = table.shape[1]
    count = received_rows.num_windows(routes.num_replica_rows, width, table.element_size())
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
