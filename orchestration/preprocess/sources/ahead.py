"""Reading ahead: a function over many items in threads, results in the items' order, few of them held at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_THREADS: Final = 16
"""Requests under way: one to a bucket takes 10 to 50 ms, whatever the processor does."""
_AHEAD: Final = 64
"""Results waiting to be used."""


def ahead(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """`map(function, items)` by several threads that work some items ahead; the first error ends it.

    Args:
        function: Called in a thread, once for each item.
        items: Read in the calling thread, only as far ahead as needed.

    Yields:
        The results in the order of the items.
    """
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="ahead") as pool:
        waiting: deque[Future[_Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
