"""Counting the bytes that operators write, for comparisons of speed that do not depend on how busy a machine is.

Products of matrices are bound by arithmetic and are counted apart; whatever else an operator writes passes through
memory, and on a CPU its time is about proportional to these bytes. Views write nothing. An operator that writes into
one of its arguments counts that argument, one that returns new memory counts what it returns.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution", "convolution_backward")
_PRODUCT_PARTS = ("scaled_dot_product", "flash_attention", "efficient_attention")
_UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
"""They reserve memory without writing it."""


class WrittenBytes(TorchDispatchMode):
    """Watches operators while it is entered.

    Attributes:
        products: Bytes written by products of matrices, attention and convolutions.
        others: Bytes written by each other operator, by its name.
        calls: How often any operator that writes was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.others: Counter[str] = Counter()
        self.calls = 0

    @property
    def other_bytes(self) -> int:
        """Bytes written outside products."""
        return self.others.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        written = 0 if name in _UNWRITTEN else _written(func._schema, args, kwargs or {}, result)
        if written:
            self.calls += 1
            if name in _PRODUCTS or any(part in name for part in _PRODUCT_PARTS):
                self.products += written
            else:
                self.others[name] += written
        return result


def _written(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes of the arguments that an operator changes, and of the results that are no part of an argument."""
    changed = [
        kwargs.get(argument.name, args[place] if place < len(args) else None)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    results = result if isinstance(result, (tuple, list)) else (result,)
    fresh = [one for one, of in zip(results, _returns(schema, len(results)), strict=False) if of.alias_info is None]
    known = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
    return sum(
        tensor.numel() * tensor.element_size() for tensor in tree_leaves(changed) if torch.is_tensor(tensor)
    ) + sum(
        tensor.numel() * tensor.element_size()
        for tensor in tree_leaves(fresh)
        if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in known
    )


def _returns(schema: Any, count: int) -> list[Any]:
    """What the schema says of each result; an operator that returns one list says it once."""
    found = list(schema.returns)
    return found * count if len(found) == 1 else found
