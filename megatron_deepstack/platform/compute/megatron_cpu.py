"""Megatron-Core on a machine without a GPU: each of its CUDA assumptions is named and adapted here.

Megatron-Core 0.16 and 0.19 use `device='cuda'`, `.cuda()` and `torch.cuda.current_device()` in code that otherwise runs
on any device. They keep their random states on CUDA generators, and assert on `'torch.cuda.FloatTensor'`.
`adapt_megatron()` replaces all of these by the CPU. It does nothing if CUDA is available. It changes `torch` for the
whole process, so only the entry points of training processes call it.
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
    _redirect_token_counts()


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` so that a CUDA device among its arguments becomes the CPU, and memory is never pinned."""

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
    """Redirect `Tensor.to('cuda')` and `.cuda()`, and let `.type()` return the names that Megatron expects."""
    torch.Tensor.to = _on_cpu(torch.Tensor.to)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign, assignment]
    plain_type = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        return _TYPE_NAMES.get(answer, answer) if isinstance(answer, str) else answer

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]


class _Stream:
    """A stream or event of a device that executes in program order, so that there is never anything to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, *args: Any) -> _Stream:
        """An event that has happened."""
        return _Stream()

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in ("wait_stream", "wait_event", "record", "synchronize", "wait"):
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
    """Switch `torch.compile` off, since on a CPU it needs a C++ compiler and a minute per process for small functions.

    Megatron decorates its functions while it is imported, which loads the whole compiler: 2.3 of the 4.5 seconds of CPU
    time that the import takes. So the decorator does nothing. If Megatron was imported before, what it has already
    decorated runs without compilation.
    """
    if "megatron.core" in sys.modules:
        torch.compiler.set_stance("force_eager")
    torch.compile = _as_it_is  # type: ignore[assignment]


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Replace `torch.compile` by a decorator, with or without arguments, that returns the function unchanged."""
    return (lambda later: later) if function is None else function


def _redirect_rng_tracker() -> None:
    """Let tensor parallelism, which forks the state of the CUDA generator, use that of the CPU generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    module: Any = megatron_random
    module._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _redirect_token_counts() -> None:
    """Let the dispatch of tokens to experts count them as numbers: on a CPU Megatron leaves them in tensors."""
    from megatron.core.transformer.moe import token_dispatcher

    module: Any = token_dispatcher

    def counts(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    module.maybe_move_tensor_to_cpu = counts
