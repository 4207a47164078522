"""From received rows to what each chunk adds in each micro-batch, and from there back to gradients of received rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy.typing as npt
import torch

from megatron_deepstack.model.language import NO_VISUAL_INPUTS, VisualInputs
from megatron_deepstack.planning.routes import ChunkRows, RankRoutes

Key = tuple[int, int]
"""(micro-batch, virtual stage)."""


@dataclass(frozen=True, slots=True)
class _Leaves:
    base: torch.Tensor
    slots: torch.Tensor


class ReceivedRows:
    """A step's received rows, cut into leaf tensors per micro-batch and chunk."""

    def __init__(self, received: torch.Tensor, routes: RankRoutes, *, requires_grad: bool) -> None:
        """`received` is (num_received + 1, H), its last row zero. Leaves require grad if anything makes use of it."""
        self.routes = routes
        self.none = received.new_empty(0, received.shape[1])
        """No rows, of their width, dtype and device; the rows themselves live on in the leaves alone."""
        self.leaves: dict[Key, _Leaves] = {}
        self.inputs: dict[Key, VisualInputs] = {}
        for key, chunk in routes.chunks.items():
            leaves = _Leaves(
                base=_take(received, chunk.base_rows).requires_grad_(requires_grad),
                slots=_take(received, chunk.slot_rows).requires_grad_(requires_grad),
            )
            self.leaves[key] = leaves
            self.inputs[key] = visual_inputs(leaves.base, leaves.slots, chunk)

    def of(self, micro_batch: int, vpp: int) -> VisualInputs:
        """What this chunk adds in this micro-batch."""
        return self.inputs.get((micro_batch, vpp), NO_VISUAL_INPUTS)

    def gradients(self) -> torch.Tensor:
        """(num_received, H) gradients of the received rows, summed over their uses."""
        grads = self.none.new_zeros(self.routes.num_received + 1, self.none.shape[1])
        for key, leaves in self.leaves.items():
            chunk = self.routes.chunks[key]
            for leaf, index in ((leaves.base, chunk.base_rows), (leaves.slots, chunk.slot_rows)):
                if leaf.grad is not None:
                    grads.index_add_(0, _index(index, grads), leaf.grad.reshape(-1, grads.shape[1]))
        return grads[:-1]


def visual_inputs(base: torch.Tensor, slots: torch.Tensor, chunk: ChunkRows) -> VisualInputs:
    """A chunk's rows with their positions on the same device; empty kinds are left out."""
    return VisualInputs(
        base_rows=base if base.shape[0] else None,
        base_positions=_index(chunk.base_positions, base) if base.shape[0] else None,
        slot_rows=slots if slots.numel() else None,
        slot_positions=_index(chunk.slot_positions, slots).view(slots.shape[:2]) if slots.numel() else None,
    )


def take_rows(rows: torch.Tensor, index: npt.NDArray) -> torch.Tensor:
    """`rows[index]` for an index of any shape: (..., H); differentiable."""
    return rows.index_select(0, _index(index, rows)).view(*index.shape, rows.shape[1])


def _take(rows: torch.Tensor, index: npt.NDArray) -> torch.Tensor:
    return take_rows(rows, index).detach()


def _index(index: npt.NDArray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(index).reshape(-1).to(like.device, non_blocking=True)
