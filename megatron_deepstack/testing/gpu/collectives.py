"""Every collective of a training step, by the backend of this machine, with one rank: does it run, is it right?

One rank cannot show a hang or a wrong order. It does show a dtype or a call that the backend refuses.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Final

import torch
import torch.distributed as dist

from megatron_deepstack.platform.compute.device import backend, local_device, synchronize
from megatron_deepstack.testing.gpu.report import Report, Settings
from megatron_deepstack.testing.gpu.timing import only_rank

_REDUCED: Final = (
    (torch.float32, dist.ReduceOp.SUM),
    (torch.bfloat16, dist.ReduceOp.SUM),
    (torch.float64, dist.ReduceOp.SUM),
    (torch.int64, dist.ReduceOp.SUM),
    (torch.int64, dist.ReduceOp.MIN),
    (torch.uint8, dist.ReduceOp.MAX),
    (torch.float32, dist.ReduceOp.MAX),
)
"""Dtype and operation of each reduction that a step, its metrics or a save asks for."""
_ROWS: Final = 1000


def run(settings: Settings, report: Report) -> None:
    """Make each call once, which creates its communicator, and then once more under the clock.

    Args:
        settings: Size and folders of the trial.
        report: Gets a row for each call, with whether its result is right.
    """
    groups = only_rank(settings)
    for name, call in _calls(groups.replica).items():
        what = f"{name}, {backend()}"
        with report.case(what):
            call()
            synchronize()
            begin = time.perf_counter()
            right = call()
            synchronize()
            report.judged(what, right, ms=1000 * (time.perf_counter() - begin))


def _calls(group: dist.ProcessGroup) -> Mapping[str, Callable[[], bool]]:
    """Calls by name; each says whether its result is what one rank must get."""
    calls: dict[str, Callable[[], bool]] = {
        f"all_reduce {str(dtype).removeprefix('torch.')} {str(operation).rsplit('.', 1)[-1]}": partial(
            _reduce, dtype, operation, group
        )
        for dtype, operation in _REDUCED
    }
    return calls | {
        "all_reduce asynchronous": partial(_reduce_later, group),
        "all_to_all_single with splits": partial(_all_to_all, group, _ROWS),
        "all_to_all_single of nothing": partial(_all_to_all, group, 0),
        "all_gather": partial(_all_gather, group),
        "all_gather_into_tensor": partial(_all_gather_into, group),
        "reduce_scatter_tensor": partial(_reduce_scatter, group),
        "broadcast": partial(_broadcast, group),
        "gather_object": _gather_object,
        "all_gather_object": partial(_all_gather_object, group),
        "broadcast_object_list": _broadcast_object,
        "barrier": _barrier,
    }


def _rows(dtype: torch.dtype = torch.bfloat16, number: int = _ROWS) -> torch.Tensor:
    return (torch.arange(number * 8, device=local_device()) % 97).to(dtype).view(number, 8)


def _reduce(dtype: torch.dtype, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> bool:
    value = _rows(dtype)
    dist.all_reduce(value, op=operation, group=group)
    return torch.equal(value, _rows(dtype))


def _reduce_later(group: dist.ProcessGroup) -> bool:
    value = _rows(torch.int64)
    work = dist.all_reduce(value, op=dist.ReduceOp.MIN, group=group, async_op=True)
    if work is not None:
        work.wait()
    return torch.equal(value, _rows(torch.int64))


def _all_to_all(group: dist.ProcessGroup, number: int) -> bool:
    source = _rows(number=number)
    target = torch.empty_like(source)
    dist.all_to_all_single(target, source, [number], [number], group=group)
    return torch.equal(target, source)


def _all_gather(group: dist.ProcessGroup) -> bool:
    parts = [torch.empty_like(_rows())]
    dist.all_gather(parts, _rows(), group=group)
    return torch.equal(parts[0], _rows())


@contextmanager
def _as_megatron_calls_it() -> Iterator[None]:
    """Without torch's warning of newer names, which the oldest torch that is supported does not have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning)
        yield


def _all_gather_into(group: dist.ProcessGroup) -> bool:
    target = torch.empty_like(_rows())
    with _as_megatron_calls_it():
        dist.all_gather_into_tensor(target, _rows(), group=group)
    return torch.equal(target, _rows())


def _reduce_scatter(group: dist.ProcessGroup) -> bool:
    target = torch.empty_like(_rows(torch.float32))
    with _as_megatron_calls_it():
        dist.reduce_scatter_tensor(target, _rows(torch.float32), group=group)
    return torch.equal(target, _rows(torch.float32))


def _broadcast(group: dist.ProcessGroup) -> bool:
    value = _rows()
    dist.broadcast(value, src=0, group=group)
    return torch.equal(value, _rows())


def _gather_object() -> bool:
    found: list[object] = [None]
    dist.gather_object({"rank": 0}, found)
    return found == [{"rank": 0}]


def _all_gather_object(group: dist.ProcessGroup) -> bool:
    found: list[object] = [None]
    dist.all_gather_object(found, "text", group=group)
    return found == ["text"]


def _broadcast_object() -> bool:
    texts = ["text"]
    dist.broadcast_object_list(texts, src=0, device=local_device())
    return texts == ["text"]


def _barrier() -> bool:
    dist.barrier()
    return True
