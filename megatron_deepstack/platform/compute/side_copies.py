"""Copies between the device and page-locked host memory that run beside what the device computes.

They have a stream of their own. A copy begins when all that was queued before it is done, and what is computed with its
result waits for it, so the host never waits. Without a GPU these are plain copies.

The host may be many passes ahead of the device. Memory that two streams use (`record_stream`) would then be free for
others only when the device has come so far, and many copies would take memory at once. So device memory of a copy
belongs to the stream that computes, and that stream waits for the copy before the memory is used for something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from megatron_deepstack.platform.compute.device import has_gpu, local_device, side_stream

_STREAM: Final = "rows"


class Fetched:
    """A tensor on its way to the device."""

    def __init__(self, pieces: Sequence[torch.Tensor]) -> None:
        """Begin to bring the pieces to the device, joined along the last dimension.

        Args:
            pieces: On the host, alike but for the last dimension. They must not change before they have arrived, except
                by a `Drained` that is begun later.
        """
        width = sum(piece.shape[-1] for piece in pieces)
        self._whole = pieces[0].new_empty(*pieces[0].shape[:-1], width, device=local_device())
        self._arrived: torch.cuda.Event | None = None
        if not has_gpu():
            torch.cat(list(pieces), dim=-1, out=self._whole)
            return
        stream = side_stream(_STREAM)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            there = [piece.to(local_device(), non_blocking=True) for piece in pieces]
            torch.cat(there, dim=-1, out=self._whole)
            self._arrived = stream.record_event()

    def take(self) -> torch.Tensor:
        """The tensor on the device; call it in any case, also where the tensor is not needed any more."""
        if self._arrived is not None:
            torch.cuda.current_stream().wait_event(self._arrived)
        return self._whole


class Drained:
    """A tensor on its way to the host."""

    def __init__(self, source: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        """Begin to copy a tensor from the device to the host, in pieces along its last dimension.

        Args:
            source: On the device; kept until `release`.
            targets: On the host, contiguous, of the source's shape but for the last dimension; together as wide as it.
        """
        self._source: torch.Tensor | None = source
        self._left: torch.cuda.Event | None = None
        pieces = source.split([target.shape[-1] for target in targets], dim=-1)
        if not has_gpu():
            for target, piece in zip(targets, pieces, strict=True):
                target.copy_(piece)
            return
        stream = side_stream(_STREAM)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for target, piece in zip(targets, pieces, strict=True):
                target.copy_(piece.contiguous(), non_blocking=True)
            self._left = stream.record_event()

    def release(self) -> None:
        """Let go of the source. What is queued on the device from now on waits for the copy."""
        if self._left is not None:
            torch.cuda.current_stream().wait_event(self._left)
        self._source = None
