"""Bytes that leave the device for the host and come back, beside what the device computes.

Copies run on a stream of their own. The host's memory is page-locked and comes from torch's cache of such memory, which
gives a buffer to the next copy once the transfers that use it are over. Without a GPU the host's copy is an array of
numpy, so that tests can tell it from what stands for the device.
"""

from __future__ import annotations

from typing import Any, Final

import numpy.typing as npt
import torch

from megatron_deepstack.platform.compute.device import local_device, side_stream

_STREAM: Final = "activations"


class HostCopy:
    """The bytes of one storage on the host, and on the device again once they were asked for.

    The device's memory is given free by `release`; until then it is held, since the transfer may still read it.
    """

    def __init__(self, storage: torch.UntypedStorage) -> None:
        """Begin the transfer to the host; it waits for what has been launched so far.

        Args:
            storage: On this rank's device. It must not be written any more.
        """
        self.nbytes = storage.nbytes()
        self._device: torch.Tensor | None = _as_bytes(storage)
        self._host: torch.Tensor | npt.NDArray | None
        self._event: Any = None
        if storage.device.type != "cuda":
            self._host = self._device.numpy().copy()
            return
        side, now = side_stream(_STREAM), torch.cuda.current_stream()
        self._host = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=True)
        side.wait_stream(now)
        with torch.cuda.stream(side):
            self._host.copy_(self._device, non_blocking=True)
            self._event = side.record_event()

    def release(self) -> None:
        """Give the device's memory free; what is launched from now on runs after the transfer to the host."""
        if self._device is None or self._host is None:
            return
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        self._device = self._event = None

    def fetch(self) -> None:
        """Begin the transfer back, unless it has begun or the bytes never left."""
        if self._device is not None:
            return
        assert self._host is not None
        if not isinstance(self._host, torch.Tensor):
            self._device = torch.empty(self.nbytes, dtype=torch.uint8)
            self._device.copy_(torch.from_numpy(self._host))
        else:
            side, device = side_stream(_STREAM), local_device()
            self._device = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
            side.wait_stream(torch.cuda.current_stream())  # the memory may be in use by what has been launched before
            with torch.cuda.stream(side):
                self._device.copy_(self._host, non_blocking=True)
                self._event = side.record_event()
            self._device.record_stream(side)
        self._host = None

    def on_device(self) -> torch.UntypedStorage:
        """Return the bytes on the device; what is launched from now on runs after they have arrived."""
        self.fetch()
        assert self._device is not None
        if self._event is not None and self._host is None:
            torch.cuda.current_stream().wait_event(self._event)
            self._event = None
        return self._device.untyped_storage()


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    with torch.no_grad():
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[arg-type]
