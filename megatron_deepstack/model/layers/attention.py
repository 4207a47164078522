"""Core attention on torch's fused `scaled_dot_product_attention`, for machines without Transformer Engine.

Causal for the decoder, full for the ViT; no mask tensor is ever made. Right padding needs none under a causal mask.
With context parallelism keys and values are gathered over cp and queries keep their global positions, a reference
implementation: Transformer Engine's ring attention is what runs on GPUs.

Legend: S local sequence, B micro-batch, A query heads of this tp rank, G key/value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.model.layers.key_value_cache import CachedStep, attend_to_cache, score_scale
from megatron_deepstack.parallel.context import gather_sequence, local_positions


@dataclass
class Packs(PackedSeqParams):
    """Where the samples of a packed row end: Megatron's form, and the numbers for a loop without a device's answer."""

    ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, ends: tuple[int, ...], bounds: torch.Tensor) -> Packs:
        """Packs of one row.

        Args:
            ends: Where its samples end; the last end is the row's length.
            bounds: int32 (samples + 1,) on the device: 0, and `ends`.

        Returns:
            Packs in the form of Transformer Engine's kernels.
        """
        longest = max(end - begin for begin, end in pairwise((0, *ends)))
        return cls(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            ends=ends,
        )

    def as_one_row(self) -> Packs:
        """The same for layers that see one plain row (S, 1, ...), and take angles that restart with each sample.

        Megatron's own rotation of packed rows reads the bounds on the host in each layer, for queries and for keys.
        """
        return replace(self, qkv_format="sbhd")  # type: ignore[call-arg]  # a field of Megatron's class


class FusedCoreAttention(torch.nn.Module):
    """Drop-in for Megatron's `DotProductAttention` in a layer spec."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert pg_collection is not None, "the layer spec passes process groups"
        self.layer_number = layer_number
        self.causal = attn_mask_type is AttnMaskType.causal
        self.scale = score_scale(config, softmax_scale)
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """`query` (S, B, A, D), `key` and `value` (S, B, G, D) to (S, B, A * D); B is 1 where rows are packed."""
        if isinstance(packed_seq_params, CachedStep):
            return attend_to_cache(
                self.layer_number,
                query,
                key,
                value,
                packed_seq_params,
                scale=self.scale,
                cp_group=self.cp_group,
            )
        if packed_seq_params is not None:
            return self._attend_packs(query, key, value, packed_seq_params)
        mask = None
        if self.cp_group is not None:
            key, value = gather_sequence(key, self.cp_group), gather_sequence(value, self.cp_group)
            mask = self._causal_mask(query.shape[0], key)
        q_BASD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out_BASD = F.scaled_dot_product_attention(
            q_BASD,
            k_BGSD,
            v_BGSD,
            attn_mask=mask,
            is_causal=self.causal and mask is None,
            scale=self.scale,
            enable_gqa=q_BASD.shape[1] != k_BGSD.shape[1],
        )
        return out_BASD.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _attend_packs(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packs: Packs) -> torch.Tensor:
        """Sample by sample, so that no mask is needed and nothing is computed that a mask would discard."""
        parts = []
        for begin, end in pairwise((0, *packs.ends)):
            q, k, v = (x[begin:end, 0].transpose(0, 1)[None] for x in (query, key, value))
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=self.causal, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            parts.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(parts)[:, None]

    def _causal_mask(self, length: int, key: torch.Tensor) -> torch.Tensor:
        """(S, S * cp) boolean: this rank's query positions against all keys in global order."""
        assert self.cp_group is not None
        positions = local_positions(length, self.cp_group, key.device)
        return positions[:, None] >= torch.arange(key.shape[0], device=key.device)[None, :]
