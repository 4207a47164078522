"""The decoder's layer: Megatron's, with a say in what autograd keeps of it between forward and backward pass.

Results that are computed again and tensors that go to the host are told apart by one pair of hooks around the layer's
forward pass (`torch.autograd.graph.saved_tensors_hooks`), so neither needs to know which operator keeps what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from megatron_deepstack.model.layers.computed_again import ComputedAgain, ResultNote, is_plain, read, stays
from megatron_deepstack.model.layers.offload import ChunkOffload, Moved


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What is kept of a chunk's layers, beside what Megatron's own settings say."""

    norms_again: bool = False
    """Whether the results of the norms before attention and MLP are computed again."""
    offloaded_layers: int = 0
    """How many layers of each chunk, from the first on, leave their activations on the host."""
    offload_above_bytes: int = 0
    """Storages of at most so many bytes stay on the device."""


ALL_KEPT = Kept()


@dataclass(frozen=True, slots=True)
class Keeping:
    """What is kept of one layer."""

    layer: int
    """Its place in the chunk, from 0."""
    norms_again: bool
    offload: ChunkOffload | None
    """Shared by the layers of the chunk."""


class DecoderLayer(TransformerLayer):
    """TransformerLayer of a decoder."""

    keeping: Keeping | None = None
    again: ComputedAgain

    def __init__(self, *args: Any, keeping: Keeping | None = None, **kwargs: Any) -> None:
        """Build the layer.

        Args:
            *args: As TransformerLayer's.
            keeping: What is kept of it; None leaves that to Megatron.
            **kwargs: As TransformerLayer's.
        """
        super().__init__(*args, **kwargs)
        self.keeping, self.again = keeping, ComputedAgain()
        for norm in (self.input_layernorm, self.pre_mlp_layernorm):
            if keeping is not None and keeping.norms_again and not isinstance(norm, IdentityOp):
                self.again.wrap(norm)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLayer's.

        Args:
            *args: Hidden states, (S, B, H), and what else TransformerLayer's takes.
            **kwargs: The rest of it.

        Returns:
            Hidden states, (S, B, H), and the context unchanged.
        """
        keeping = self.keeping
        if keeping is None or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        if keeping.offload is not None:
            keeping.offload.begin(keeping.layer, self.parameters(), _shared(args, kwargs))
        self.again.open(self._keep)
        try:
            with saved_tensors_hooks(self._keep, read):
                hidden_states, context = super().forward(*args, **kwargs)
        finally:
            self.again.close()
        if keeping.offload is not None:
            keeping.offload.end(keeping.layer, hidden_states)
        return hidden_states, context

    def _should_call_te_cudagraph(self, *args: Any, **kwargs: Any) -> bool:
        """Graphs hold a step of training; what runs without gradients may have other shapes."""
        return torch.is_grad_enabled() and bool(super()._should_call_te_cudagraph(*args, **kwargs))

    def _te_cuda_graph_replay(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's for a whole layer; the graph gets what it was captured with, see `step.layer_graphs`."""
        assert kwargs.get("packed_seq_params") is None, "packed rows cannot be captured in a CUDA graph"
        hidden_states = args[0] if args else kwargs["hidden_states"]
        graph = self.cuda_graphs[getattr(self, "current_microbatch", 0) % len(self.cuda_graphs)]
        (output,) = graph(hidden_states, rotary_pos_emb=kwargs["rotary_pos_emb"])
        return output, kwargs.get("context")

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor | ResultNote | Moved:
        assert self.keeping is not None
        if not is_plain(tensor):
            return stays(tensor)
        kept = self.again.note(tensor)
        if kept is None and self.keeping.offload is not None:
            return self.keeping.offload.move(tensor) or stays(tensor)
        return kept or stays(tensor)


def _shared(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a layer gets, but for hidden states that a layer before it has computed."""
    hidden = args[0] if args else kwargs["hidden_states"]
    found = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    return [one for one in found if one is not hidden or one.is_leaf]
