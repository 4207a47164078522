"""What a trial asks of the device: its memory, its versions, and where the host waited for it."""

from __future__ import annotations

import gc
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from megatron_deepstack.platform.compute.device import has_gpu

_WAIT: Final = "synchronizing CUDA operation"
"""What torch's warning about a wait of the host says."""
_PACKAGE: Final = "megatron_deepstack"


def release_memory() -> None:
    """Give back device memory of tensors that nothing holds any more, and count the peak from here on."""
    gc.collect()
    if has_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def cudnn_version() -> int:
    """cuDNN's version as one number, such as 91900 for 9.19; 0 without it."""
    return torch.backends.cudnn.version() or 0


@contextmanager
def whole_float32() -> Iterator[None]:
    """Within it, products of float32 tensors keep all their bits: no TF32 in matrix products or convolutions."""
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def host_waits(action: Callable[[], object]) -> Counter[str]:
    """Run `action` and count where the host waited for the GPU.

    Args:
        action: What to watch. The first run of anything also waits for memory and for kernels to load, so run it once
            before.

    Returns:
        How often, by place: `file:line` of the innermost code outside torch, and of ours where that is another. Waits
        that torch does not know of, such as those inside NCCL, are not counted. Empty without a GPU.
    """
    if not has_gpu():
        action()
        return Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        return waits_in_warnings(action)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits_in_warnings(action: Callable[[], object]) -> Counter[str]:
    """Run `action` and count torch's warnings about waits by place, as `host_waits` has them made."""
    found: Counter[str] = Counter()
    show = warnings.showwarning

    def note(message: Warning | str, *rest: object) -> None:
        if _WAIT in str(message):
            found[_place(traceback.extract_stack(sys._getframe(1)))] += 1
        else:
            show(message, *rest)  # type: ignore[arg-type]

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=f".*{_WAIT}.*")
        warnings.showwarning = note  # type: ignore[assignment]
        action()
    return found


def _place(stack: traceback.StackSummary) -> str:
    """Innermost frame outside torch and, where it is not ours, the innermost frame that is."""
    frames = [frame for frame in reversed(stack) if not _is_torch(frame.filename)]
    if not frames:
        return "inside torch"
    mine = next((frame for frame in frames if _PACKAGE in Path(frame.filename).parts), frames[0])
    places = [frames[0]] if mine is frames[0] else [frames[0], mine]
    return " < ".join(f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in places)


def _is_torch(filename: str) -> bool:
    parts = Path(filename).parts
    return "torch" in parts or Path(filename).name in ("warnings.py", Path(__file__).name)


def _short(filename: str) -> str:
    return "/".join(Path(filename).parts[-3:])
