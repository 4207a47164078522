"""A step's received rows in host memory, of which the device holds a few micro-batches at a time.

With many micro-batches the rows of stacks are most of a first stage's memory, although a schedule needs those of few
micro-batches at once. Here each window of the exchange goes to page-locked host memory as it arrives. The rows of a
micro-batch come to the device one forward pass ahead, and stay until its backward pass; their gradients then take the
place of the rows on the host, and are sent back window by window. Losses and gradients are those of `ReceivedRows`,
bit for bit.

Legend: N rows of a step on this rank, H hidden size, W columns of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist

from megatron_deepstack.model.language import NO_VISUAL_INPUTS, VisualInputs
from megatron_deepstack.planning.exchange.routes import RankRoutes
from megatron_deepstack.platform.compute.device import synchronize
from megatron_deepstack.platform.compute.host_memory import HostMemory, lay_out
from megatron_deepstack.platform.compute.side_copies import Drained, Fetched
from megatron_deepstack.platform.compute.upload import upload, upload_all
from megatron_deepstack.routing.exchange import ExchangeIndex, receive_windows, return_windows, windows
from megatron_deepstack.step.visual import Key, position_arrays, visual_inputs

_BASE, _SLOTS = "base", "slots"
_ROOM = 1.25
"""Memory is reserved with so much room, since page-locking takes seconds and steps differ in their number of rows."""


class RowMemory:
    """The host memory of a rank's rows, which every step uses again. It is reserved when a step first needs it."""

    def __init__(self) -> None:
        self._memory: HostMemory | None = None

    def blocks(self, num_rows: int, widths: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
        """Lay out the windows of a step, one after another. Those of the step before are void.

        Args:
            num_rows: N.
            widths: W of each window.
            dtype: Of the rows.

        Returns:
            (N, W) tensors, contiguous each; their values are left over from the step before.
        """
        shapes = [torch.empty(num_rows, width, dtype=dtype, device="meta") for width in widths]
        offsets, num_bytes = lay_out(shapes)
        self._memory = self._memory or HostMemory("rows")
        if num_bytes > self._memory.num_bytes:
            synchronize()  # the step before may still read what is given back here
            self._memory.reserve(int(_ROOM * num_bytes))
        return [self._memory.view(offset, like) for offset, like in zip(offsets, shapes, strict=True)]


class HostRows:
    """A step's received rows on the host, as leaf tensors on the device while a pass needs them, then their gradients.

    It takes the place of `ReceivedRows`.
    """

    def __init__(
        self,
        table: torch.Tensor,
        routes: RankRoutes,
        group: dist.ProcessGroup,
        memory: RowMemory,
        order: Sequence[Key],
        *,
        requires_grad: bool,
        index: ExchangeIndex | None = None,
        positions: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Send the rows of this rank's table, and move received rows to the host. Collective over the replica.

        Args:
            table: (num_local_rows, H) as for `routing.exchange.send_rows`.
            routes: This rank's side of the exchange.
            group: The ranks of the replica.
            memory: Where the rows rest.
            order: Micro-batch and virtual stage of this rank's forward passes, in their order.
            requires_grad: Whether gradients of the rows are asked for after the schedule.
            index: The index of the exchange on the device; uploaded here if it is not given.
            positions: `position_arrays` of the routes' chunks on the device; uploaded here if they are not given.
        """
        self._routes, index = routes, index or ExchangeIndex.of(routes)
        self._requires_grad, self._like = requires_grad, table.new_empty(0, table.shape[1])
        columns = windows(routes, table)
        blocks = memory.blocks(len(routes.stored_rows), [one.stop - one.start for one in columns], table.dtype)
        self._blocks = dict(zip((one.start for one in columns), blocks, strict=True))
        for one, rows in receive_windows(table, routes, group, index):
            self._blocks[one.start].copy_(rows, non_blocking=True)
        uploaded = upload_all(position_arrays(routes.chunks.values())) if positions is None else positions
        self._positions = {key: uploaded[2 * n : 2 * n + 2] for n, key in enumerate(routes.chunks)}
        wanted = [key for key in order if key in routes.chunks]
        assert len(set(wanted)) == len(routes.chunks), "a chunk with rows is not in the schedule"
        self._after = dict(pairwise(wanted))
        self._without_gradient = {(key, part) for key in wanted for part in (_BASE, _SLOTS)}
        self._ahead: tuple[Key, Fetched] | None = None
        self._draining: Drained | None = None
        self._fetch_ahead(wanted[0] if wanted else None)

    def of(self, micro_batch: int, vpp: int) -> VisualInputs:
        """What a chunk adds in a micro-batch; asked once per step for each, in the order of forward passes.

        Args:
            micro_batch: Its number in the step, from 0.
            vpp: Virtual stage, from 0.

        Returns:
            The rows and their positions; without rows where the chunk adds none.
        """
        key = micro_batch, vpp
        chunk = self._routes.chunks.get(key)
        if chunk is None:
            return NO_VISUAL_INPUTS
        assert self._ahead is not None, f"the rows of {key} were asked for twice"
        (ahead, fetched), self._ahead = self._ahead, None
        assert ahead == key, f"the rows of {key} were asked for where those of {ahead} come next"
        whole = fetched.take()
        self._fetch_ahead(self._after.get(key))
        number = len(chunk.base_rows)
        base, slots = whole[:number].data, whole[number:].view(*chunk.slot_rows.shape, whole.shape[1]).data
        if self._requires_grad:
            self._keep_gradient(base, (key, _BASE))
            self._keep_gradient(slots, (key, _SLOTS))
        return visual_inputs(base, slots, *self._positions[key])

    def return_gradients(self, group: dist.ProcessGroup, index: ExchangeIndex | None = None) -> torch.Tensor:
        """Return the gradients to the ranks that made the rows, after the schedule. Collective over the replica.

        Args:
            group: The ranks of the replica.
            index: The index of the exchange on the device; uploaded here if it is not given.

        Returns:
            (num_local_rows, H), the gradients of this rank's table; zero where none came.
        """
        for name in self._without_gradient:
            pieces = self._pieces(*name)
            self._drain(self._like.new_zeros(len(pieces[0]), self._like.shape[1]), pieces)
        self._without_gradient.clear()
        if self._draining is not None:
            self._draining.release()
        index = index or ExchangeIndex.of(self._routes)
        return return_windows(
            lambda columns: upload(self._blocks[columns.start]), self._like, self._routes, group, index
        )

    def _fetch_ahead(self, key: Key | None) -> None:
        if key is not None:
            self._ahead = key, Fetched(self._pieces(key))

    def _drain(self, source: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        """Begin to copy gradients to the host; those of the call before have arrived there by now."""
        before, self._draining = self._draining, Drained(source, targets)
        if before is not None:
            before.release()

    def _pieces(self, key: Key, part: str | None = None) -> list[torch.Tensor]:
        """The rows of a chunk in each block: those of one part, or both parts one after the other."""
        chunk = self._routes.chunks[key]
        first, middle = chunk.first, chunk.first + len(chunk.base_rows)
        stop = middle + chunk.slot_rows.size
        begin, end = {None: (first, stop), _BASE: (first, middle), _SLOTS: (middle, stop)}[part]
        return [block[begin:end] for block in self._blocks.values()]

    def _keep_gradient(self, leaf: torch.Tensor, name: tuple[Key, str]) -> None:
        """Move the leaf's gradient to the place of its rows, as soon as the backward of all that used them is over."""
        leaf.requires_grad_()

        def keep(leaf: torch.Tensor) -> None:
            assert name in self._without_gradient, f"rows {name} were used in two backwards"
            assert leaf.grad is not None
            self._without_gradient.discard(name)
            self._drain(leaf.grad.view(-1, leaf.shape[-1]), self._pieces(*name))
            leaf.grad = None

        leaf.register_post_accumulate_grad_hook(keep)
