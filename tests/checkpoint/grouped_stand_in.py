"""Transformer Engine's GroupedLinear in plain torch, below Megatron's own classes for it, for ranks on a CPU.

Megatron defines its classes of grouped products only where Transformer Engine is installed. Here their source is run
with a stand-in below it, so that names, shapes and checkpoints are Megatron's own.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch


class StandInGroupedLinear(torch.nn.Module):
    """The parameters and methods that Megatron uses, as in version 2.20: weight0, weight1, ... and one extra state."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        init_method: Callable[[torch.Tensor], Any],
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        super().__init__()
        assert not bias
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fp8_meta, self.fp8, self.fp8_calibration = {"fp8_checkpoint": False}, False, False
        for number in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
            init_method(weight)
            self.register_parameter(f"weight{number}", weight)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Nothing without FP8."""

    def get_extra_state(self) -> torch.Tensor:
        """As Transformer Engine's without FP8: no bytes."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        """There is nothing to set."""

    def forward(self, rows_TX: torch.Tensor, splits: Sequence[int], **_: Any) -> torch.Tensor:
        """Each group of rows times its own weight."""
        groups = torch.split(rows_TX, list(splits))
        products = (group @ getattr(self, f"weight{number}").T for number, group in enumerate(groups))
        return torch.cat(list(products))


def _megatrons_classes() -> dict[str, Any]:
    """Megatron's classes of grouped products, of the installed version, over the stand-in."""
    from megatron.core.extensions import transformer_engine

    wanted = ("TEGroupedLinear", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear")
    found = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(transformer_engine)))
        if isinstance(node, ast.ClassDef) and node.name in wanted
    ]
    assert [node.name for node in found] == list(wanted)
    names = {
        **vars(transformer_engine),
        "te": SimpleNamespace(pytorch=SimpleNamespace(GroupedLinear=StandInGroupedLinear)),
        "is_te_min_version": lambda version, *_, **__: version == "2.0.0",
        "_get_extra_te_kwargs": lambda config: {"params_dtype": config.params_dtype},
        "_get_fp8_autocast_for_quant_params": lambda *_: _nothing(),
        "_get_fp8_model_init_for_quant_params": lambda *_: _nothing(),
    }
    exec(compile(ast.Module(found, type_ignores=[]), "grouped products", "exec"), names)
    return {name: names[name] for name in wanted}


def _megatrons_random() -> list[tuple[Any, str, Any]]:
    """What lets Megatron compute an activation again without Transformer Engine; since 0.17 without a compiler."""
    from megatron.core.tensor_parallel import random

    begin = random.CheckpointWithoutOutput.__init__

    def without_fp8(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.fp8 = False

    found: list[tuple[Any, str, Any]] = [(random.CheckpointWithoutOutput, "__init__", without_fp8)]
    if hasattr(random, "_get_share_storage"):
        found.append((random, "_get_share_storage", lambda: _copy_storage))
    return found


def _copy_storage(target: torch.Tensor, source: torch.Tensor) -> None:
    target.untyped_storage().resize_(source.untyped_storage().size())
    target.untyped_storage().copy_(source.untyped_storage())


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def grouped_stand_in() -> Iterator[None]:
    """Experts in grouped products, as where Transformer Engine is installed; all else local, while a `with` lasts."""
    from megatron.core.extensions import transformer_engine_spec_provider as provider

    from megatron_deepstack.model.layers import experts

    classes, random = _megatrons_classes(), _megatrons_random()
    changes: list[tuple[Any, str, Any]] = [
        *((provider, name, kind) for name, kind in classes.items() if name != "TEGroupedLinear"),
        *random,
        (experts, "_backend", lambda engine: provider.TESpecProvider()),
        (experts, "expert_products", lambda *, engine: experts.ExpertProducts.GROUPED),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    experts.expert_mlp.cache_clear()
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        experts.expert_mlp.cache_clear()


def with_grouped(rank: int, function: Callable[..., Any], *args: Any) -> Any:
    """What a rank's function gives where experts are grouped."""
    with grouped_stand_in():
        return function(rank, *args)
