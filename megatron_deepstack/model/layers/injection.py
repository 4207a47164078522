"""The injection: a transformer layer that adds its rows to the hidden states before it runs.

Megatron's TransformerBlock hands `context` and `context_mask` unchanged to every layer and passes both through
activation recomputation as explicit arguments; decoder-only layers do not use them. A chunk's rows travel there: the
sum is then part of what recomputation repeats, gradients reach the rows, and nothing is looked up in state that
another micro-batch may have changed since (1F1B recomputes m while m + k is current).

Legend: S local sequence, B micro-batch, H hidden, N slots of the chunk, R rows of the fullest slot.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_deepstack.model.layers.decoder_layer import DecoderLayer


def add_rows(hidden_SBH: torch.Tensor, rows_RH: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
    """Hidden states with rows added, out of place; gradients flow to both.

    Args:
        hidden_SBH: Hidden states.
        rows_RH: Rows to add, cast to the hidden states' dtype.
        positions_R: int64, the flat position s * B + b of each row; several rows may share one.

    Returns:
        (S, B, H).
    """
    flat = hidden_SBH.reshape(-1, hidden_SBH.shape[-1])
    return flat.index_add(0, positions_R, rows_RH.to(flat.dtype)).view_as(hidden_SBH)


def put_rows(hidden_SBH: torch.Tensor, rows_RH: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
    """Hidden states with rows in place of what was there, out of place.

    The base visual tokens take the placeholders' place, and no gradient reaches the embedding of the placeholder.

    Args:
        hidden_SBH: Hidden states.
        rows_RH: Rows to put, cast to the hidden states' dtype.
        positions_R: int64, the flat position s * B + b of each row; all different.

    Returns:
        (S, B, H).
    """
    flat = hidden_SBH.reshape(-1, hidden_SBH.shape[-1])
    return flat.index_copy(0, positions_R, rows_RH.to(flat.dtype)).view_as(hidden_SBH)


class InjectionLayer(DecoderLayer):
    """DecoderLayer whose input receives the chunk's rows of number `slot_index`.

    The addition is in `_forward_attention`, through which all of Megatron's passes go, and around the replay of a CUDA
    graph, which holds the layer alone.

    `context` is (N, R, H), or None where the micro-batch adds nothing in this chunk; `context_mask` holds the rows'
    flat positions, (N, R) int64. Shorter slots are filled with zero rows at position 0.
    """

    def __init__(self, *args: Any, slot_index: int | None, after_index: int | None = None, **kwargs: Any) -> None:
        """Build the layer.

        Args:
            *args: As DecoderLayer's.
            slot_index: Which of the chunk's slots is added to the layer's input; None for none.
            after_index: Which of them is added to its output; only for the decoder's last layer.
            **kwargs: As DecoderLayer's.
        """
        super().__init__(*args, **kwargs)
        self.slot_index, self.after_index = slot_index, after_index

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As DecoderLayer's, followed by the rows after the last layer of a decoder, where there are any.

        Args:
            *args: Hidden states, (S, B, H), and what else DecoderLayer's takes.
            **kwargs: `context` and `context_mask` as above; the rest is DecoderLayer's.

        Returns:
            Hidden states, (S, B, H), and the context unchanged.
        """
        hidden_states, context = super().forward(*args, **kwargs)
        return _added(hidden_states, kwargs.get("context"), kwargs.get("context_mask"), self.after_index), context

    def _te_cuda_graph_capture(self, *args: Any, **kwargs: Any) -> Any:
        """As DecoderLayer's. Rows are added outside of a graph, since their number differs between micro-batches."""
        assert kwargs.get("context") is None, "a CUDA graph of a layer must not hold the rows that are added to it"
        return super()._te_cuda_graph_capture(*args, **kwargs)

    def _te_cuda_graph_replay(self, *args: Any, **kwargs: Any) -> Any:
        """As DecoderLayer's, between the additions of rows to the input and to the output."""
        hidden_states = args[0] if args else kwargs["hidden_states"]
        rows, positions = kwargs.get("context"), kwargs.get("context_mask")
        hidden_states = _added(hidden_states, rows, positions, self.slot_index)
        output, context = super()._te_cuda_graph_replay(hidden_states, **_without_hidden(kwargs))
        return _added(output, rows, positions, self.after_index), context

    def _forward_attention(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As DecoderLayer's, after the addition; returns (hidden states before the MLP, context)."""
        hidden_states = _added(hidden_states, context, context_mask, self.slot_index)
        return super()._forward_attention(hidden_states, *args, context=context, context_mask=context_mask, **kwargs)


def _added(
    hidden_SBH: torch.Tensor, rows_NRH: torch.Tensor | None, positions_NR: torch.Tensor | None, index: int | None
) -> torch.Tensor:
    """Hidden states with the rows of one of the chunk's slots, if there are any."""
    if rows_NRH is None or index is None:
        return hidden_SBH
    assert positions_NR is not None
    return add_rows(hidden_SBH, rows_NRH[index], positions_NR[index])


def _without_hidden(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "hidden_states"}
