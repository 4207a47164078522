"""Core attention on torch's fused `scaled_dot_product_attention`, for machines without Transformer Engine.

Causal for the decoder, full for the ViT; no mask tensor is ever made. Right padding needs none under a causal mask.
With context parallelism keys and values are gathered over cp, and each of the two pieces of queries that a rank holds
of a sample attends to the keys up to its own end. This is a reference implementation: on GPUs, Transformer
Engine's ring attention is used.

Legend: S local sequence, B micro-batch, A query heads of this tp rank, G key/value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.model.layers.key_value_cache import CachedStep, attend_to_cache, score_scale
from megatron_deepstack.parallel.context import gather_sequence, pieces


@dataclass
class Packs(PackedSeqParams):
    """Where the samples of a packed row end: for Megatron, and as numbers on the host."""

    ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, ends: tuple[int, ...], bounds: torch.Tensor) -> Packs:
        """Packs of one row.

        Args:
            ends: Where its samples end in the whole row, whatever part of it a cp rank holds; the last is its length.
            bounds: int32 (samples + 1,) on the device: 0, and `ends`.

        Returns:
            Packs in the form of Transformer Engine's kernels.
        """
        longest = max(end - begin for begin, end in pairwise((0, *ends)))
        return cls(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            # Ring attention asks for these too. The same tensor says that nothing lies between samples: what pads a
            # sample counts as a part of it.
            cu_seqlens_q_padded=bounds,
            cu_seqlens_kv_padded=bounds,
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
        """Attention within each sample. Collective over cp; gradients flow to queries, keys and values.

        Args:
            query: (S, B, A, D); the decoder's are rotated. B is 1 where rows are packed.
            key: (S, B, G, D), rotated like the queries.
            value: (S, B, G, D).
            attention_mask: Not used: what is masked follows from the positions.
            attn_mask_type: Not used: the layer's own kind counts.
            attention_bias: Not used.
            packed_seq_params: `Packs` of a packed row, a `CachedStep` in generation, or None.
            **_: Not used; later versions of Megatron-Core pass more.

        Returns:
            (S, B, A * D).
        """
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
            ends = packed_seq_params.ends
        else:
            ends = (query.shape[0] if self.cp_group is None else query.shape[0] * self.cp_group.size(),)
        if self.cp_group is not None:
            key, value = (gather_sequence(x, self.cp_group, ends) for x in (key, value))
            ranges = pieces(ends, self.cp_group.size(), self.cp_group.rank())
        else:
            ranges = list(pairwise((0, *ends)))
        begins = dict(zip(ends, (0, *ends), strict=False))
        parts, taken = [], 0
        for begin, end in ranges:
            first = begins[next(bound for bound in ends if bound >= end)]
            parts.append(self._attend(query[taken : taken + end - begin], key[first:end], value[first:end]))
            taken += end - begin
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of the last positions of a sample: (Q, B, A, D) with (K, B, G, D) to (Q, B, A * D); K >= Q."""
        q_BAQD, k_BGKD, v_BGKD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask, same = None, query.shape[0] == key.shape[0]
        if self.causal and not same:
            mask = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool, device=query.device)
            mask = mask.tril(key.shape[0] - query.shape[0])
        out_BAQD = F.scaled_dot_product_attention(
            q_BAQD,
            k_BGKD,
            v_BGKD,
            attn_mask=mask,
            is_causal=self.causal and same,
            scale=self.scale,
            enable_gqa=q_BAQD.shape[1] != k_BGKD.shape[1],
        )
        return out_BAQD.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


class RowOfFrames(torch.nn.Module):
    """What Transformer Engine's core attention needs for a row of many frames; comes before it among the bases.

    The layer sees one plain row, whose queries and keys are rotated already. The kernel gets the bounds of all frames
    at once, so that no frame takes a call of its own.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: Packs,
        **rest: Any,
    ) -> torch.Tensor:
        """Attention within each frame. Gradients flow to queries, keys and values.

        Args:
            query: (S, 1, A, D), rotated.
            key: (S, 1, A, D), rotated.
            value: (S, 1, A, D).
            attention_mask: None.
            packed_seq_params: Where each frame ends.
            **rest: What Megatron-Core passes besides.

        Returns:
            (S, 1, A * D).
        """
        frames = replace(packed_seq_params, qkv_format="thd")  # type: ignore[call-arg]  # a field of Megatron's class
        rows = (x.squeeze(1) for x in (query, key, value))
        found = super().forward(*rows, attention_mask, packed_seq_params=frames, **rest)
        return found.reshape(found.shape[0], 1, -1)


@cache
def frame_by_frame(attention: type) -> type:
    """A core attention of Transformer Engine for rows of frames.

    Args:
        attention: Its class, which Megatron builds and calls with named arguments.

    Returns:
        A subclass, the same one for the same class.
    """
    return type(f"Framed{attention.__name__}", (RowOfFrames, attention), {})
