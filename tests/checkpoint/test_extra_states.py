"""Transformer Engine unpickles extra states only where its environment variable allows it; a stand-in that asks."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_deepstack.checkpoint.content.state import load_weights
from megatron_deepstack.checkpoint.load import _held_by_weights_alone
from megatron_deepstack.config.choices import Fp8Scaling

VARIABLE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


class Layer(torch.nn.Module):
    """Refuses as Transformer Engine 2.20 does."""

    taken: list[object]

    def __init__(self) -> None:
        super().__init__()
        self.taken = []

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(3, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        if os.environ.get(VARIABLE) != "1":
            raise RuntimeError("Refusing to load pickled Transformer Engine extra state")
        self.taken.append(state)


class Encoder(torch.nn.Module):
    """Its weights are loaded after the decoder's, and must not be under the exception."""

    def load_state_dict(self, *_: Any, **__: Any) -> tuple[list[str], list[str]]:  # type: ignore[override]
        assert os.environ.get(VARIABLE) != "1"
        return [], []


def model_of(layer: torch.nn.Module, scaling: Fp8Scaling) -> Any:
    config = SimpleNamespace(fp8="hybrid", fp8_recipe=scaling.value)
    return SimpleNamespace(config=config, chunks=[layer], encoder=Encoder())


@pytest.mark.parametrize("before", [None, "0"])
def test_delayed_scaling_is_resumed(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    """And the variable is as it was before, whatever happens."""
    if before is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, before)
    layer = Layer()
    load_weights(model_of(layer, Fp8Scaling.DELAYED), {"decoder0": layer.state_dict(), "encoder": {}})
    assert len(layer.taken) == 1
    assert os.environ.get(VARIABLE) == before
    with pytest.raises(KeyError):
        load_weights(model_of(layer, Fp8Scaling.DELAYED), {})
    assert os.environ.get(VARIABLE) == before


def test_weights_alone_hold_none() -> None:
    """Nor adapters: a run under delayed scaling begins from a converted folder as any other does."""
    held = ("decoder.layers.0.mlp.linear_fc1.weight",)
    asked = (*held, "decoder.layers.0.mlp.linear_fc1._extra_state", "decoder.layers.0.mlp.linear_fc1.lora_a")
    assert tuple(_held_by_weights_alone(dict.fromkeys(asked))) == held


def test_nothing_else_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    layer = Layer()
    with pytest.raises(RuntimeError, match="Refusing to load pickled"):
        load_weights(model_of(layer, Fp8Scaling.TENSORWISE), {"decoder0": layer.state_dict(), "encoder": {}})
