"""From received rows to what each chunk adds in each micro-batch, and from there back to gradients of received rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_deepstack.model.language import NO_VISUAL_INPUTS, VisualInputs
from megatron_deepstack.planning.exchange.routes import ChunkRows, RankRoutes
from megatron_deepstack.platform.compute.upload import upload_all
from megatron_deepstack.routing.exchange import ExchangeIndex, return_gradients

Key = tuple[int, int]
"""(micro-batch, virtual stage)."""


class ReceivedRows:
    """A step's received rows, cut into leaf tensors per micro-batch and chunk, and then their gradients.

    Rows and gradients share one storage: once a leaf's gradient is known nothing reads its rows any more, so the
    gradient takes their place. So a step holds its rows once.
    """

    def __init__(
        self,
        stored: torch.Tensor,
        routes: RankRoutes,
        *,
        requires_grad: bool,
        positions: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Cut `stored`, which is overwritten by gradients.

        Args:
            stored: (len(stored_rows), H) as `send_rows` returns it.
            routes: This rank's side of the exchange.
            requires_grad: Whether gradients of the rows are asked for after the schedule.
            positions: `position_arrays` of the routes' chunks on the device; uploaded here if they are not given.
        """
        self._stored, self._routes = stored, routes
        self._without_gradient: dict[tuple[Key, str], torch.Tensor] = {}
        self.inputs: dict[Key, VisualInputs] = {}
        uploaded = iter(upload_all(position_arrays(routes.chunks.values())) if positions is None else positions)
        for key, chunk in routes.chunks.items():
            middle = chunk.first + len(chunk.base_rows)
            base = stored[chunk.first : middle].data
            slots = stored[middle : middle + chunk.slot_rows.size].view(*chunk.slot_rows.shape, stored.shape[1]).data
            if requires_grad:
                self._keep_gradient(base, (key, "base"))
                self._keep_gradient(slots, (key, "slots"))
            self.inputs[key] = visual_inputs(base, slots, next(uploaded), next(uploaded))

    def of(self, micro_batch: int, vpp: int) -> VisualInputs:
        """What a chunk adds in a micro-batch.

        Args:
            micro_batch: Its number in the step, from 0.
            vpp: Virtual stage, from 0.

        Returns:
            The rows and their positions; without rows where the chunk adds none.
        """
        return self.inputs.get((micro_batch, vpp), NO_VISUAL_INPUTS)

    def take_gradients(self) -> torch.Tensor:
        """Hand over the gradients, after the schedule; the rows are gone then.

        Returns:
            (len(stored_rows), H) in the order of `stored_rows`; zero if no gradient came.
        """
        for leaf in self._without_gradient.values():
            leaf.data.zero_()
        stored = self._stored
        self._stored = stored[:0].clone()
        self._without_gradient.clear()
        self.inputs.clear()
        return stored

    def return_gradients(self, group: dist.ProcessGroup, index: ExchangeIndex | None = None) -> torch.Tensor:
        """Return the gradients to the ranks that made the rows, after the schedule. Collective over the replica.

        Args:
            group: The ranks of the replica.
            index: The index of the exchange on the device; uploaded here if it is not given.

        Returns:
            (num_local_rows, H), the gradients of this rank's table; zero where none came.
        """
        return return_gradients(self.take_gradients(), self._routes, group, index)

    def _keep_gradient(self, leaf: torch.Tensor, name: tuple[Key, str]) -> None:
        """Put the leaf's gradient where its rows were, as soon as the backward of all that used them is over.

        Written through `.data`: autograd counts changes of a tensor and would take this one for a change of what
        a later backward needs. No backward needs it: leaves share no element, and this leaf's backward is over.
        """
        leaf.requires_grad_()
        self._without_gradient[name] = leaf

        def keep(leaf: torch.Tensor) -> None:
            assert name in self._without_gradient, f"rows {name} were used in two backwards"
            assert leaf.grad is not None
            del self._without_gradient[name]
            leaf.data.copy_(leaf.grad)
            leaf.grad = None

        leaf.register_post_accumulate_grad_hook(keep)


def position_arrays(chunks: Iterable[ChunkRows]) -> list[np.ndarray]:
    """Of each chunk in turn its base positions (R0,) and its slots' positions (N, R), on the host."""
    return [array for chunk in chunks for array in (chunk.base_positions, chunk.slot_positions)]


def visual_inputs(
    base: torch.Tensor, slots: torch.Tensor, base_positions: torch.Tensor, slot_positions: torch.Tensor
) -> VisualInputs:
    """Put a chunk's rows and positions together; kinds of which there are none are left out.

    Args:
        base: (R0, H), the base rows.
        slots: (N, R, H), the rows of N slots.
        base_positions: (R0,) int64 flat positions s * B + b.
        slot_positions: N * R int64 flat positions, in any shape.

    Returns:
        What the chunk adds.
    """
    return VisualInputs(
        base_rows=base if base.shape[0] else None,
        base_positions=base_positions if base.shape[0] else None,
        slot_rows=slots if slots.numel() else None,
        slot_positions=slot_positions.view(slots.shape[:2]) if slots.numel() else None,
    )


def of_stretch(inputs: VisualInputs, micro_batch_size: int, first: int, stop: int) -> VisualInputs:
    """What a chunk adds at some positions of whole sequences, in a forward pass of these positions alone.

    Args:
        inputs: What it adds at all positions; sequences are not split over ranks.
        micro_batch_size: B.
        first: First position.
        stop: One past the last position.

    Returns:
        The rows of these positions, whose flat positions then count from `first`. In slots the other rows are zero.
    """
    begin, end = first * micro_batch_size, stop * micro_batch_size
    base_rows, base_positions = inputs.base_rows, inputs.base_positions
    if base_positions is not None and base_rows is not None:
        there = (base_positions >= begin) & (base_positions < end)
        base_rows, base_positions = base_rows[there], base_positions[there] - begin
    slot_rows, slot_positions = inputs.slot_rows, inputs.slot_positions
    if slot_positions is not None and slot_rows is not None:
        elsewhere = (slot_positions < begin) | (slot_positions >= end)
        slot_rows = slot_rows.masked_fill(elsewhere[..., None], 0)
        slot_positions = (slot_positions - begin).masked_fill(elsewhere, 0)
    return VisualInputs(base_rows, base_positions, slot_rows, slot_positions)


def take_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`rows[index]` for an index of any shape; gradients flow to `rows`.

    Args:
        rows: (M, H).
        index: int64 of any shape, on the same device.

    Returns:
        (*index.shape, H), a copy.
    """
    return rows.index_select(0, index.reshape(-1)).view(*index.shape, rows.shape[1])
