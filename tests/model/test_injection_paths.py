"""The injection stands where each of Megatron's paths through a layer passes: also that which CUDA graphs capture."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_deepstack.model.layers.injection import InjectionLayer


def layer_of_ones(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An injection layer of slot 1 without modules; Megatron's attention part returns what it is given."""

    def attention(self: Any, hidden_states: torch.Tensor, *_: Any, context: Any = None, **__: Any) -> Any:
        return hidden_states, context

    monkeypatch.setattr(TransformerLayer, "_forward_attention", attention)
    monkeypatch.setattr(TransformerLayer, "_forward_mlp", lambda self, hidden_states, *_, **__: hidden_states)
    layer = InjectionLayer.__new__(InjectionLayer)
    torch.nn.Module.__init__(layer)
    layer.slot_index, layer.after_index = 1, None
    layer.offload_module_in_cuda_graph = False
    layer.config = SimpleNamespace(cuda_graph_scope=[], cuda_graph_modules=[])
    return layer


@pytest.mark.parametrize("path", ["forward", "_te_cuda_graph_capture"])
def test_every_path_adds_the_rows(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    layer = layer_of_ones(monkeypatch)
    context = torch.stack([torch.full((2, 4), 5.0), torch.full((2, 4), 3.0)])
    positions = torch.tensor([[0, 0], [1, 2]])
    outputs = getattr(layer, path)(
        hidden_states=torch.ones(3, 1, 4), attention_mask=None, context=context, context_mask=positions
    )
    assert outputs[0][:, 0, 0].tolist() == [1.0, 4.0, 4.0]


def test_megatron_still_has_the_method_that_is_overridden() -> None:
    """Another name in a later Megatron would leave ours uncalled."""
    assert "self._forward_attention(" in inspect.getsource(TransformerLayer.forward)
    assert "self._forward_attention(" in inspect.getsource(TransformerLayer._te_cuda_graph_capture)


def test_rows_after_a_layer_are_not_lost_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of_ones(monkeypatch)
    layer.after_index = 0
    with pytest.raises(AssertionError, match="cannot be captured"):
        layer._te_cuda_graph_capture(hidden_states=torch.ones(3, 1, 4), attention_mask=None)
