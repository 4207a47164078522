"""The exchange of a step: rows to the ranks that add them, and their gradients back to the ranks that made them.

Both directions are one `all_to_all_single` with uneven splits on the replica's own group. Every rank calls both in
every step, with zero-length splits where it has nothing to send, so a step without images cannot hang the others.
No call is made inside the pipeline schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_deepstack.planning.routes import RankRoutes


def send_rows(table: torch.Tensor, routes: RankRoutes, group: dist.ProcessGroup) -> torch.Tensor:
    """Deliver rows of every rank's `table` (num_local_rows, H); returns (num_received + 1, H), the last row zero.

    Collective over the replica. No gradient flows through it: `return_gradients` is its reverse.
    """
    outgoing = table.detach().index_select(0, _index(routes.send_rows, table))
    received = table.new_empty(routes.num_received + 1, table.shape[1])
    received[-1].zero_()
    _all_to_all(received[:-1], outgoing, routes.receive_splits, routes.send_splits, group)
    return received


def return_gradients(grads: torch.Tensor, routes: RankRoutes, group: dist.ProcessGroup) -> torch.Tensor:
    """Send gradients (num_received, H) of received rows home; returns the local table's, (num_local_rows, H).

    Collective over the replica. Every row comes back once (where several tp ranks added the same row, the plan lets one
    of them answer) but the newline, which ends each row of each mosaic: its gradients, hundreds, are summed in float32,
    since a bf16 sum loses what is 256 times smaller, and CUDA's takes its terms in any order.
    """
    outgoing = grads.index_select(0, _index(routes.return_rows, grads))
    incoming = grads.new_empty(sum(routes.returned_splits), grads.shape[1])
    _all_to_all(incoming, outgoing, routes.returned_splits, routes.return_splits, group)
    table = grads.new_zeros(routes.num_local_rows, grads.shape[1])
    table.index_copy_(0, _index(routes.returned_rows, grads), incoming)
    newlines = np.flatnonzero(routes.returned_rows == routes.num_local_rows - 1)
    table[-1] = incoming.index_select(0, _index(newlines, grads)).sum(0, dtype=torch.float32)
    return table


def _index(rows: object, like: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(rows, dtype=torch.int64).to(like.device, non_blocking=True)


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
