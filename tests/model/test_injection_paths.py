"""The injection on each of Megatron's paths through a layer: within a plain pass, and around a CUDA graph."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.module import GraphableMegatronModule
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


ROWS = torch.stack([torch.full((2, 4), 5.0), torch.full((2, 4), 3.0)])
POSITIONS = torch.tensor([[0, 0], [1, 2]])


def test_a_plain_pass_adds_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of_ones(monkeypatch)
    hidden = torch.ones(3, 1, 4)
    outputs = layer.forward(hidden_states=hidden, attention_mask=None, context=ROWS, context_mask=POSITIONS)
    assert outputs[0][:, 0, 0].tolist() == [1.0, 4.0, 4.0]


@pytest.mark.parametrize("after", [None, 0], ids=["before", "before-and-after"])
def test_a_replayed_graph_stands_between_the_additions(monkeypatch: pytest.MonkeyPatch, after: int | None) -> None:
    """Number 1 goes to the input, and number 0 to the output if it belongs after the layer."""
    layer, seen = layer_of_ones(monkeypatch), []
    layer.after_index, layer.current_microbatch = after, 3

    def graph(hidden: torch.Tensor, *, rotary_pos_emb: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(hidden[:, 0, 0].tolist())
        return (hidden * 10,)

    layer.cuda_graphs = [None, graph]
    output, context = layer._te_cuda_graph_replay(
        hidden_states=torch.ones(3, 1, 4), rotary_pos_emb=ROWS, context=ROWS, context_mask=POSITIONS
    )
    assert context is ROWS
    assert seen == [[1.0, 4.0, 4.0]]
    assert output[:, 0, 0].tolist() == ([10.0, 40.0, 40.0] if after is None else [20.0, 40.0, 40.0])


def test_what_is_captured_has_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of_ones(monkeypatch)
    layer.after_index = 0
    (output,) = layer._te_cuda_graph_capture(torch.ones(3, 1, 4), rotary_pos_emb=ROWS)
    assert output[:, 0, 0].tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(AssertionError, match="must not hold the rows"):
        layer._te_cuda_graph_capture(torch.ones(3, 1, 4), context=ROWS, context_mask=POSITIONS)


def test_packed_rows_are_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of_ones(monkeypatch)
    layer.cuda_graphs = [None]
    with pytest.raises(AssertionError, match="packed rows cannot be captured"):
        layer._te_cuda_graph_replay(hidden_states=torch.ones(3, 1, 4), packed_seq_params=object())


def test_megatron_still_has_the_methods_that_are_overridden() -> None:
    """Another name in a later Megatron would leave ours uncalled."""
    assert "self._forward_attention(" in inspect.getsource(TransformerLayer.forward)
    assert "self._forward_attention(" in inspect.getsource(TransformerLayer._te_cuda_graph_capture)
    called = inspect.getsource(GraphableMegatronModule.__call__)
    assert all(name in called for name in ("_should_call_te_cudagraph", "_te_cuda_graph_replay", "self.cuda_graphs"))
