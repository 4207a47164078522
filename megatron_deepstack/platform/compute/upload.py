"""Uploads to the device that never make the host wait: many small arrays travel as one, from page-locked memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from megatron_deepstack.platform.compute.device import has_gpu, local_device, side_stream
from megatron_deepstack.platform.compute.host_memory import lay_out

_STREAM: Final = "uploads"


def upload(host: torch.Tensor) -> torch.Tensor:
    """A host tensor on this rank's device; the tensor itself where it is there already, as on a CPU.

    The page-locked copy comes from torch's cache of such memory, which keeps it until the transfer is over.
    """
    device = local_device()
    return host if host.device == device else host.pin_memory().to(device, non_blocking=True)


def upload_all(arrays: Sequence[npt.NDArray]) -> list[torch.Tensor]:
    """Arrays of any shapes on this rank's device, in one transfer.

    Args:
        arrays: Whole numbers; none, or empty ones, are allowed.

    Returns:
        int64 tensors of the same shapes and numbers in the same order, which share one storage.
    """
    if not arrays:
        return []
    together = upload(torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays], dtype=np.int64)))
    parts = together.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


class Upload:
    """Tensors on their way to the device: one page-locked buffer, and one transfer beside what the device computes.

    Any thread may begin an upload; the thread that computes takes it. Without a GPU the buffer itself is what is taken.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy the tensors into the buffer and begin the transfer. Never waits for the device.

        Args:
            tensors: On the host, of any shapes and dtypes; they may change afterwards.
        """
        offsets, end = lay_out(tensors)
        self._places = [(offset, one.dtype, one.shape) for offset, one in zip(offsets, tensors, strict=True)]
        self._arrived: torch.cuda.Event | None = None
        if not has_gpu():
            self._buffer = self._filled(tensors, torch.empty(end, dtype=torch.uint8))
            return
        device = local_device()
        with (
            torch.cuda.device(device),
            torch.cuda.stream(side_stream(_STREAM)),
        ):  # a new thread begins with the first device
            buffer = self._filled(tensors, torch.empty(end, dtype=torch.uint8, pin_memory=True))
            self._buffer = buffer.to(device, non_blocking=True)  # torch keeps the host's memory until it is over
            self._arrived = torch.cuda.current_stream().record_event()

    def _filled(self, tensors: Sequence[torch.Tensor], buffer: torch.Tensor) -> torch.Tensor:
        for tensor, place in zip(tensors, self._views(buffer), strict=True):
            place.copy_(tensor)
        return buffer

    def take(self) -> list[torch.Tensor]:
        """The tensors on the device, which share one storage. What is computed with them waits for the transfer.

        Returns:
            As they were given, in the same order.
        """
        if self._arrived is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._arrived)
            self._buffer.record_stream(stream)
        return self._views(self._buffer)

    def _views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        views = []
        for begin, dtype, shape in self._places:
            bytes_ = buffer[begin : begin + shape.numel() * dtype.itemsize]
            views.append(bytes_.view(dtype).view(shape))
        return views
