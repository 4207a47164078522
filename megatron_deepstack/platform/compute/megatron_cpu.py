"""Megatron-Core on a machine without a GPU: each of its CUDA assumptions, named and adapted once.

Megatron-Core 0.16 and 0.19 write `device='cuda'`, `.cuda()` and `torch.cuda.current_device()` in code that
otherwise runs on any device, keep their random states on CUDA generators, and assert on `'torch.cuda.FloatTensor'`.
`adapt_megatron()` answers these with the CPU. It does nothing where CUDA is available. It changes `torch` for the
whole process, so it is called by the entry points of training processes and by nothing else.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from megatron_deepstack.platform.compute.transformer_engine import engine_problem

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "empty_like", "zeros_like")
_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
}
_adapted = False


def adapt_megatron() -> None:
    """Install the adaptations once; where CUDA is available only a broken Transformer Engine is put aside."""
    global _adapted
    if "megatron.core" not in sys.modules:
        engine_problem()
    if _adapted or torch.cuda.is_available():
        return
    _adapted = True
    _redirect_factories()
    _redirect_tensor_methods()
    _replace_device_queries()
    _replace_random_states()
    _disable_jit()
    _redirect_rng_tracker()


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with a `device` of CUDA replaced by the CPU, by name or by position, and no pinned memory."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return function(*(_CPU if _is_cuda(arg) else arg for arg in args), **kwargs)

    return wrapped


def _redirect_factories() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _redirect_tensor_methods() -> None:
    """`Tensor.to('cuda')`, `.cuda()`, and `.type()` as the optimizers' assertions spell it."""
    torch.Tensor.to = _on_cpu(torch.Tensor.to)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign, assignment]
    plain_type = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        return _TYPE_NAMES.get(answer, answer) if isinstance(answer, str) else answer

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]


class _Stream:
    """A stream or event of a device that executes in program order: every wait is over already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in ("wait_stream", "wait_event", "record", "record_event", "synchronize", "wait"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def _replace_device_queries() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.current_stream = lambda device=None: _Stream()
    cuda.default_stream = lambda device=None: _Stream()
    cuda.stream = lambda stream: nullcontext()
    cuda.Stream = _Stream
    cuda.Event = _Stream


def _replace_random_states() -> None:
    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed


def _disable_jit() -> None:
    """`torch.compile` on a CPU asks for a C++ compiler and a minute per process; the fused functions are small.

    Megatron decorates them while it is imported, which loads the whole compiler: 2.3 of the 4.5 seconds of CPU that a
    process takes to import it. So nothing is compiled at all, and where Megatron is there already, nothing is used.
    """
    if "megatron.core" in sys.modules:
        torch.compiler.set_stance("force_eager")
    torch.compile = _as_it_is  # type: ignore[assignment]


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Takes the place of `torch.compile`, as a decorator with or without arguments: the function itself."""
    return (lambda later: later) if function is None else function


def _redirect_rng_tracker() -> None:
    """The CUDA generator's state, which tensor parallelism forks, is the CPU generator's here."""
    from megatron.core.tensor_parallel import random as megatron_random

    module: Any = megatron_random
    module._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
