"""The exchange of a step: rows go to the ranks that add them, and gradients return to the ranks that made the rows.

Both directions are `all_to_all_single` with uneven splits on the process group of the replica. Every rank calls both in
every step, with splits of length zero if it has nothing to send, so a step without images cannot make other ranks hang.
No call is made inside the pipeline schedule.

The rows of many micro-batches take most of the memory of a first stage. So each direction works in *windows* of
columns: temporary copies hold only one window at a time, beside the result. A small step is one window.

Legend: H is the hidden size of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist

from megatron_deepstack.planning.budget import received_rows
from megatron_deepstack.planning.exchange.routes import RankRoutes
from megatron_deepstack.platform.compute.upload import upload_all


@dataclass(frozen=True, slots=True)
class ExchangeIndex:
    """The index tensors of both directions, int64 on the device of the rows."""

    sending: torch.Tensor
    """Rows of this rank's table, in the order in which they are sent."""
    storing: torch.Tensor
    """For each stored row its place among the received ones; that after the last is a row of zeros."""
    arriving: torch.Tensor
    """Rows of this rank's table whose gradients arrive, in the order of arrival."""
    newlines: torch.Tensor
    """Which of the arriving gradients are the newline's."""
    returning: torch.Tensor
    """Where each received row is stored, in the order of arrival; empty if this rank returns no gradient."""

    @classmethod
    def of(cls, routes: RankRoutes) -> ExchangeIndex:
        """Upload the index of a step now, in one transfer.

        Args:
            routes: This rank's side of the exchange.

        Returns:
            The index.
        """
        return cls(*upload_all(index_arrays(routes)))


def index_arrays(routes: RankRoutes) -> list[np.ndarray]:
    """What an `ExchangeIndex` consists of, on the host.

    Args:
        routes: This rank's side of the exchange.

    Returns:
        Arrays of whole numbers in the order of its fields.
    """
    newlines = np.flatnonzero(routes.returned_rows == routes.num_local_rows - 1)
    returning = np.empty(routes.num_received + 1, np.int64)
    returning[routes.stored_rows] = np.arange(len(routes.stored_rows))  # all padding goes to the last entry
    returning = returning[:-1] if routes.returns_gradients else returning[:0]
    return [
        np.asarray(each) for each in (routes.send_rows, routes.stored_rows, routes.returned_rows, newlines, returning)
    ]


def send_rows(
    table: torch.Tensor, routes: RankRoutes, group: dist.ProcessGroup, index: ExchangeIndex | None = None
) -> torch.Tensor:
    """Deliver rows of every rank's table to the ranks that add them.

    Collective over the replica. Autograd does not pass through this function; `return_gradients` is its reverse.

    Args:
        table: (num_local_rows, H), the rows that this rank made, with the newline as the last row. Any float dtype.
        routes: This rank's side of the exchange.
        group: The ranks of the replica.
        index: Its index on the device; uploaded here if it is not given.

    Returns:
        (len(stored_rows), H) in the dtype of `table`: the received rows in the order of `routes.stored_rows`. Rows of
        padding are zero.
    """
    stored = table.new_empty(len(routes.stored_rows), table.shape[1])
    for columns, rows in receive_windows(table, routes, group, index or ExchangeIndex.of(routes)):
        stored[:, columns] = rows
    return stored


def receive_windows(
    table: torch.Tensor, routes: RankRoutes, group: dist.ProcessGroup, index: ExchangeIndex
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Deliver rows as `send_rows` does, and let the caller keep each window of columns as it arrives.

    Collective over the replica; every rank takes all windows.

    Args:
        table: As for `send_rows`.
        routes: This rank's side of the exchange.
        group: The ranks of the replica.
        index: Its index on the device.

    Yields:
        Each of `windows`, and the (len(stored_rows), columns) rows in these columns.
    """
    table = table.detach()
    for columns in windows(routes, table):
        outgoing = table[:, columns].index_select(0, index.sending)
        received = outgoing.new_empty(routes.num_received + 1, outgoing.shape[1])
        received[-1].zero_()
        _all_to_all(received[:-1], outgoing, routes.receive_splits, routes.send_splits, group)
        yield columns, received.index_select(0, index.storing)


def return_gradients(
    grads: torch.Tensor, routes: RankRoutes, group: dist.ProcessGroup, index: ExchangeIndex | None = None
) -> torch.Tensor:
    """Return the gradients of received rows to the ranks that made the rows.

    Collective over the replica. Every row except the newline has one gradient: if several tp ranks added the same row,
    the plan makes only one of them return it. The newline ends each line of each mosaic, so it has hundreds of
    gradients. They are summed in float32, since a bf16 sum loses terms that are 256 times smaller, and a sum on CUDA
    adds its terms in no fixed order.

    Args:
        grads: (len(stored_rows), H) gradients in the order of `routes.stored_rows`. Those of padding are ignored.
        routes: This rank's side of the exchange.
        group: The ranks of the replica.
        index: As for `send_rows`.

    Returns:
        (num_local_rows, H) in the dtype of `grads`: the gradients of this rank's table.
    """
    return return_windows(lambda columns: grads[:, columns], grads, routes, group, index or ExchangeIndex.of(routes))


def return_windows(
    window: Callable[[slice], torch.Tensor],
    like: torch.Tensor,
    routes: RankRoutes,
    group: dist.ProcessGroup,
    index: ExchangeIndex,
) -> torch.Tensor:
    """Return gradients as `return_gradients` does, of which the caller gives one window of columns after another.

    Args:
        window: Asked once for each of `windows`; returns the (len(stored_rows), columns) gradients in these columns.
        like: Any (..., H) tensor of the gradients' dtype and device.
        routes: This rank's side of the exchange.
        group: The ranks of the replica.
        index: Its index on the device.

    Returns:
        (num_local_rows, H), the gradients of this rank's table.
    """
    table = like.new_zeros(routes.num_local_rows, like.shape[1])
    for columns in windows(routes, like):
        outgoing = window(columns).index_select(0, index.returning)
        incoming = outgoing.new_empty(sum(routes.returned_splits), outgoing.shape[1])
        _all_to_all(incoming, outgoing, routes.returned_splits, routes.return_splits, group)
        table[:, columns].index_copy_(0, index.arriving, incoming)
        table[-1, columns] = incoming.index_select(0, index.newlines).sum(0, dtype=torch.float32)
    return table


def windows(routes: RankRoutes, table: torch.Tensor) -> list[slice]:
    """Return the ranges of columns that are exchanged together, which are the same on all ranks of the replica.

    Args:
        routes: Any rank's side of the exchange.
        table: Any (..., H) tensor of the rows' dtype.

    Returns:
        The ranges, from the first column to the last.
    """
    width = table.shape[1]
    count = received_rows.num_windows(routes.num_replica_rows, width, table.element_size())
    bounds = [width * k // count for k in range(count + 1)]
    return [slice(first, stop) for first, stop in pairwise(bounds)]


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
