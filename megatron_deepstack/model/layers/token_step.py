"""A decoder's layers for steps of one token of each sequence, with a key/value cache and without gradients.

Megatron's layers prepare for gradients, other ranks and many options with each call, and for one token that takes
longer than the products. `TokenLayers` calls the same linears, norms and activations of these layers one after another,
and does for all layers together what does not differ between them: the rotation's sines and cosines. The operators and
their order are those of Megatron's forward, so the numbers are too.

Legend: B micro-batch, H hidden, G key/value heads, N query heads of each of them, D head width, K cached positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_deepstack.model.layers.attention import FusedCoreAttention
from megatron_deepstack.model.layers.decoder_layer import DecoderLayer
from megatron_deepstack.model.layers.gated import GatedSilu
from megatron_deepstack.model.layers.injection import InjectionLayer
from megatron_deepstack.model.layers.key_value_cache import CachedStep

WithBias = tuple[torch.Tensor, torch.Tensor | None]
"""What Megatron's linears return: a product, and a bias that the caller adds."""


class TokenLayers:
    """The layers of a chunk, for steps of one token to which no rows are added."""

    def __init__(self, block: TransformerBlock) -> None:
        """Take the layers of a block that `can_take` accepts, whose linears `plain_linears` has simplified.

        Args:
            block: The chunk's layers. They are not changed, and their parameters are read at each step.
        """
        self._layers = [_TokenLayer(layer) for layer in block.layers]
        self._final_norm = _function(block.final_layernorm)

    @staticmethod
    def can_take(block: TransformerBlock) -> bool:
        """Whether all layers of a block are of the kinds that this module knows, on one tensor- and context rank.

        Layers of Transformer Engine are not: they join norms and linears in kernels of their own.
        """
        config = block.config
        alone = config.tensor_model_parallel_size == config.context_parallel_size == 1
        return alone and not config.apply_rope_fusion and all(_is_known(layer) for layer in block.layers)

    def __call__(self, hidden_1BH: torch.Tensor, angles: torch.Tensor, step: CachedStep) -> torch.Tensor:
        """Run the layers and the norm behind them, if the chunk has it. No gradient flows.

        Args:
            hidden_1BH: Hidden states of the tokens; not changed.
            angles: (1, B or 1, 1, D), by which queries and keys are rotated.
            step: Where the tokens are. The cache takes their keys and values.

        Returns:
            (1, B, H).
        """
        angles_BGND = angles[0, :, None]
        cosines, sines = angles_BGND.cos().to(hidden_1BH.dtype), angles_BGND.sin().to(hidden_1BH.dtype)
        half = sines.shape[-1] // 2
        turn = (cosines, torch.cat((-sines[..., :half], sines[..., half:]), dim=-1))
        hidden_BH = hidden_1BH[0]
        for layer in self._layers:
            hidden_BH = layer(hidden_BH, turn, step)
        if self._final_norm is None:
            return hidden_BH[None].clone()  # a stage sends it on and then frees it, so it must be no view
        return self._final_norm(hidden_BH)[None]  # type: ignore[no-any-return]


def _is_known(layer: Any) -> bool:
    if type(layer) not in (DecoderLayer, InjectionLayer):
        return False
    attention = layer.self_attention
    return type(attention) is SelfAttention and type(attention.core_attention) is FusedCoreAttention


class _TokenLayer:
    """One layer's parts, ready to be called."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attention
        core = attention.core_attention
        self._number, self._scale = core.layer_number, core.scale
        groups = attention.num_query_groups_per_partition
        self._queries = attention.num_attention_heads_per_partition // groups
        self._heads = (groups, self._queries + 2, attention.hidden_size_per_attention_head)
        self._norm = _function(layer.input_layernorm)
        self._qkv, self._proj = attention.linear_qkv.forward, attention.linear_proj.forward
        self._query_norm, self._key_norm = _function(attention.q_layernorm), _function(attention.k_layernorm)
        self._add_attention, self._add_mlp = _addition(layer.self_attn_bda), _addition(layer.mlp_bda)
        self._mlp_norm, self._mlp = _function(layer.pre_mlp_layernorm), _mlp(layer.mlp)

    def __call__(
        self, hidden_BH: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], step: CachedStep
    ) -> torch.Tensor:
        attended = self._attend(self._norm(hidden_BH), turn, step)
        hidden_BH = self._add_attention(self._proj(attended), hidden_BH)
        return self._add_mlp(self._mlp(self._mlp_norm(hidden_BH)), hidden_BH)

    def _attend(
        self, normed_BH: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], step: CachedStep
    ) -> torch.Tensor:
        """(B, H) to (B, G * N * D)."""
        batch, num = len(normed_BH), self._queries
        mixed = self._qkv(normed_BH)[0].view(batch, *self._heads)
        both = mixed[:, :, : num + 1]
        if self._query_norm is not None and self._key_norm is not None:
            both = torch.cat((self._query_norm(both[:, :, :num]), self._key_norm(both[:, :, num:])), dim=2)
        cosines, sines = turn
        # Rotating by half a head and a sine with its sign is Megatron's (-x2, x1) times the sine.
        both = (both * cosines).add_(both.roll(cosines.shape[-1] // 2, -1).mul_(sines))
        k_BGKD, v_BGKD = step.keep(self._number, both[None, :, :, num], mixed[None, :, :, num + 1])
        # Query heads that share a key/value head are as positions of one head, so that no key is copied.
        found_BGND = F.scaled_dot_product_attention(
            both[:, :, :num], k_BGKD, v_BGKD, attn_mask=step.mask, scale=self._scale
        )
        return found_BGND.reshape(batch, -1)


def _function(module: torch.nn.Module | None) -> Any:
    """What a norm computes, without the calls around a module; None for no norm."""
    if module is None or isinstance(module, IdentityOp):
        return None
    if type(module) is torch.nn.RMSNorm:
        return partial(_rms_norm, module)
    return module


def _rms_norm(norm: torch.nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return torch.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)  # type: ignore[arg-type]


def _addition(chooser: Any) -> Callable[[WithBias, torch.Tensor], torch.Tensor]:
    """What a layer adds to its hidden states: Megatron's plain sum, or what the spec has in its place."""
    if chooser is get_bias_dropout_add:
        return _add
    return partial(chooser(False, False), dropout=0.0)


def _add(output_with_bias: WithBias, residual: torch.Tensor) -> torch.Tensor:
    output, bias = output_with_bias
    return (output if bias is None else output.add_(bias)).add_(residual)


def _mlp(mlp: Any) -> Callable[[torch.Tensor], WithBias]:
    """What an MLP computes; experts, and fused activations, are called as they are."""
    if type(mlp) is not MLP or mlp.config.bias_activation_fusion:
        return partial(_by_module, mlp)
    into, out = mlp.linear_fc1.forward, mlp.linear_fc2.forward
    activation = F.silu if isinstance(mlp.activation_func, GatedSilu) else mlp.activation_func

    def gated(x: torch.Tensor) -> WithBias:
        inner, bias = into(x)
        gate, other = (inner if bias is None else inner + bias).chunk(2, dim=-1)
        return out(activation(gate) * other)  # type: ignore[no-any-return]

    return gated


def _by_module(mlp: torch.nn.Module, x: torch.Tensor) -> WithBias:
    output, bias = mlp(x[None])
    return output[0], bias
