"""Host memory that another process can map, and copies into it that run beside training.

It is anonymous memory with a file handle (`memfd`): nothing is left behind when a process is killed, and it is not
bound by the size of /dev/shm. Where there is a GPU it is page-locked, so that copies run at the bus's full speed.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch

from megatron_deepstack.platform.compute.device import has_gpu

_ALIGNMENT = 64
"""Bytes; more than any number format needs."""


class HostMemory:
    """A region that grows and is reused. `handle` may be inherited by another process and mapped there."""

    def __init__(self, purpose: str = "checkpoints") -> None:
        """Make a region without any memory.

        Args:
            purpose: What is copied into it, for the system's list of files and for messages.
        """
        self.purpose = purpose
        self.handle = os.memfd_create(purpose)
        self.num_bytes = 0
        self.is_locked = False
        """Whether it is page-locked now; if not, copies from a GPU are slower and hold up the host."""
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, num_bytes: int) -> None:
        """Make room, page-locked where there is a GPU and the system allows it; else with a warning, not locked.

        Locking touches every page, which takes seconds for many gigabytes: call it where no training waits. Tensors
        of an earlier call are void if the memory grows.
        """
        if num_bytes <= self.num_bytes:
            return
        self._unlock()
        os.ftruncate(self.handle, num_bytes)
        self._bytes = torch.frombuffer(mmap.mmap(self.handle, num_bytes), dtype=torch.uint8)
        self.num_bytes = num_bytes
        if has_gpu():
            self._lock()

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

    def _lock(self) -> None:
        try:
            register_pages(self._bytes)
            self.is_locked = True
        except RuntimeError as error:
            warnings.warn(
                f"{self.num_bytes} bytes of host memory cannot be page-locked ({error}); copies of {self.purpose} from "
                "the GPU will be slower. A higher limit of locked memory (ulimit -l) or less memory in use may help",
                RuntimeWarning,
                stacklevel=2,
            )

    def _unlock(self) -> None:
        if self.is_locked:
            unregister_pages(self._bytes)
            self.is_locked = False


def register_pages(memory: torch.Tensor) -> None:
    """Page-lock a contiguous host tensor for copies from and to the GPU. Raises RuntimeError where CUDA refuses."""
    status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    torch.cuda.check_error(status)


def unregister_pages(memory: torch.Tensor) -> None:
    """End `register_pages` of the same tensor. Raises RuntimeError where CUDA refuses."""
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))


def lay_out(tensors: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Offsets of tensors one after the other, aligned, and the bytes that all take."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def copies_behind_queued_work() -> Callable[[Sequence[tuple[torch.Tensor, torch.Tensor]]], None]:
    """Remember the work queued on the device so far, so that another thread can copy what it leaves.

    Returns:
        A function of (target in host memory, source) pairs that makes the copies and returns once they are made. It
        may be called in any thread; from a GPU it copies on a stream of its own, behind the remembered work. The
        sources must not change before it has returned.
    """
    if not has_gpu():
        return _copy
    queued = torch.cuda.Event()
    queued.record()
    return partial(_copy_behind, queued, torch.cuda.current_device())


def _copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], non_blocking: bool = False) -> None:
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source, non_blocking=non_blocking)


def _copy_behind(queued: torch.cuda.Event, device: int, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """The current device and stream belong to a thread, so both are set here."""
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
        stream = torch.cuda.current_stream()
        stream.wait_event(queued)
        _copy(pairs, non_blocking=True)
        stream.synchronize()
