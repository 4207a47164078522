"""Host memory that another process can map, and copies into it that run beside training.

It is anonymous memory with a file handle (`memfd`): nothing is left behind when a process is killed, and it is not
bound by the size of /dev/shm. Where there is a GPU it is page-locked, so that copies run at the bus's full speed.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence

import torch

from megatron_deepstack.platform.compute.device import has_gpu

_ALIGNMENT = 64


class HostMemory:
    """A region that grows and is reused. `handle` may be inherited by another process and mapped there."""

    def __init__(self) -> None:
        self.handle = os.memfd_create("checkpoint")
        self.num_bytes = 0
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, num_bytes: int) -> None:
        """Make room. Tensors of an earlier call are void if it grows."""
        if num_bytes <= self.num_bytes:
            return
        self._unlock()
        os.ftruncate(self.handle, num_bytes)
        self._bytes = torch.frombuffer(mmap.mmap(self.handle, num_bytes), dtype=torch.uint8)
        self.num_bytes = num_bytes
        if has_gpu():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), num_bytes, 0))

    def view(self, offset: int, like: torch.Tensor) -> torch.Tensor:
        """Return a contiguous tensor in this memory.

        Args:
            offset: Its first byte, as `lay_out` returns it.
            like: A tensor of the same shape and dtype.

        Returns:
            The tensor, valid until the memory grows or is closed.
        """
        part = self._bytes[offset : offset + like.numel() * like.element_size()]
        return part.view(like.dtype).view(like.shape)

    def close(self) -> None:
        """Give the memory back."""
        self._unlock()
        self._bytes, self.num_bytes = torch.empty(0, dtype=torch.uint8), 0
        os.close(self.handle)

    def _unlock(self) -> None:
        if has_gpu() and self.num_bytes:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr()))


def lay_out(tensors: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Offsets of tensors one after the other, aligned, and the bytes that all take."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def start_copies(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
    """Begin to copy (target in host memory, source) pairs; the result ends it and may be called in another thread.

    From a GPU the copies are queued on a stream of their own, behind the work queued so far. From host memory they
    are made by the call of the result. Sources must not change before it has returned.
    """
    if not has_gpu():
        return lambda: _copy(pairs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        done = torch.cuda.Event()
        done.record(stream)
    return lambda: _wait(done, pairs)


def _copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source)


def _wait(done: torch.cuda.Event, sources: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Keeps the sources' memory from being used anew until the copies are made."""
    done.synchronize()
    del sources
