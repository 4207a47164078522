"""Transformer Engine's AdamW in plain torch, with the interface and the states of version 2.20, for ranks on a CPU."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch


class StandInAdam(torch.optim.Optimizer):
    """The options and methods that Megatron and this package use; updates in float32, as the kernels compute."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        assert adam_w_mode
        assert not capturable
        assert not store_param_remainders, "main parameters are to be whole"
        self.master_weights, self.use_decoupled_grad = master_weights, use_decoupled_grad
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": master_weight_dtype}
        self.copies_made = 0

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        """As Transformer Engine's: zero moments, and a main parameter as the parameter is."""
        assert not store_param_remainders
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros_like(param, dtype=self.dtypes[name])
        if self.master_weights:
            self.state[param]["master_param"] = param.detach().clone().to(self.dtypes["master_param"])

    def state_dict(self) -> dict[str, Any]:
        """Float32 copies of states, as Transformer Engine gives them."""
        found = super().state_dict()
        for number, states in found["state"].items():
            self.copies_made += len(states)
            found["state"][number] = {name: tensor.float() for name, tensor in states.items()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The states in the dtypes they are kept in."""
        super().load_state_dict(state_dict)
        for states in self.state.values():
            for name in states:
                states[name] = states[name].to(self.dtypes[name])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param, False)
                self._update(group, param, self.state[param])

    def _update(self, group: dict[str, Any], param: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        gradient = (param.decoupled_grad if self.use_decoupled_grad else param.grad).float()  # type: ignore[attr-defined, union-attr]
        beta1, beta2 = group["betas"]
        first = torch.lerp(state["exp_avg"].float(), gradient, 1 - beta1)
        second = torch.lerp(state["exp_avg_sq"].float(), gradient * gradient, 1 - beta2)
        main = state.get("master_param", param)
        change = first / (second.sqrt() / math.sqrt(1 - beta2 ** group["step"]) + group["eps"])
        change = change / (1 - beta1 ** group["step"])
        main.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * change)
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        if main is not param:
            param.copy_(main)


@contextmanager
def stand_in_adam() -> Iterator[None]:
    """Megatron as it is where Transformer Engine's optimizer is installed, for the length of a `with`."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer, optimizer_config

    changes: list[tuple[Any, str, Any]] = [
        (optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (optimizer, "Adam", StandInAdam),
        (optimizer, "is_te_min_version", lambda *_: True),
        (optimizer_config, "is_te_min_version", lambda *_: True),
        (distrib_optimizer, "Adam", StandInAdam),
        (distrib_optimizer, "HAVE_APEX_OR_TE", True),
        (distrib_optimizer, "USING_TE_OPTIMIZER", True),
    ]
    before = [(module, name, getattr(module, name, None)) for module, name, _ in changes]
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers")
    modules = {name: sys.modules.get(name) for name in names}
    for module, name, value in changes:
        setattr(module, name, value)
    for name in names:
        sys.modules[name] = ModuleType(name)
    sys.modules[names[-1]].FusedAdam = StandInAdam  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        for name, old in modules.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
