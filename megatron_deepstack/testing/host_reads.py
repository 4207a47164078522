"""Counting where the host would wait for a GPU, on a machine without one, by the line of code that asks.

A read of a device's number makes the host wait until all queued work is done, and the device then runs dry. On a CPU
nothing waits, but the same operators are called: `_local_scalar_dense` (`item()`, `int(tensor)`, `if tensor`),
operators whose result's shape depends on values (`nonzero`, masks as indices), and copies to the host. `tolist()`,
`cpu()` and `numpy()` of a tensor that is on the host already reach no operator, so they are seen as functions.
Uploads are counted beside: `torch.tensor(numbers, device=...)` and `tensor.to(device)` of memory that is not pinned.
"""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::repeat_interleave",
    "aten::is_nonzero",
    "aten::equal",
)
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")
_READING_METHODS = ("tolist", "cpu", "numpy")


class HostReads:
    """A context that counts reads and uploads of everything that runs inside it, backward included.

    `reads` and `uploads` map a site, "part of a step, path of the file:function", to how often it asked. The part is
    "schedule" for what Megatron's schedules call, and "step" for the rest.
    """

    def __init__(self) -> None:
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self._modes: tuple[Any, ...] = ()

    def count_read(self) -> None:
        """Called where something is read; a count of updates that torch's Adam keeps on the host is none."""
        if not _in_torch_adam():
            self.reads[_site()] += 1

    def __enter__(self) -> HostReads:
        self._modes = (_Functions(self), _Operators(self))
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Operators(TorchDispatchMode):
    def __init__(self, found: HostReads) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name in _READS or (name in _INDEXING and _has_mask(args[1]) and not _is_masked_fill(args)):
            self._found.count_read()
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, found: HostReads) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _READING_METHODS and args and isinstance(args[0], torch.Tensor):
            self._found.count_read()
        elif (name == "tensor" and kwargs.get("device") is not None) or (name == "to" and _names_device(args, kwargs)):
            self._found.uploads[_site()] += 1
        return func(*args, **kwargs)


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _is_masked_fill(args: tuple[Any, ...]) -> bool:
    """One mask and one number: torch fills such elements without finding out which they are."""
    return len(args) > 2 and len(args[1]) == 1 and args[2].numel() == 1


def _in_torch_adam() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("/torch/optim/adam.py"):
            return True
        frame = frame.f_back
    return False


def _names_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.device) for value in (*args, *kwargs.values()))


def _site() -> str:
    """Part of the step, and the nearest function outside torch and this module."""
    frame: FrameType | None = sys._getframe(1)
    site, part = "", "step"
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if not site and file != __file__ and "/torch/" not in file and not file.endswith("/megatron_cpu.py"):
            site = f"{_short(file)}:{function}"
        if function.startswith("forward_backward_"):
            part = "schedule"
        frame = frame.f_back
    return f"{part} {site}"


def _short(file: str) -> str:
    for root in ("/megatron_deepstack/", "/megatron/core/", "/transformer_engine/"):
        if root in file:
            return root[1:] + file.rsplit(root, 1)[1]
    return file.rsplit("/", 1)[-1]
