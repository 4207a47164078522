"""The key/value cache of generation: what the layers know of a step that goes on from cached keys and values.

Megatron-Core's StaticInferenceContext has one position for a whole batch, drops the causal mask after the first step,
and rotates all cached keys again for each token. So it carries neither batches of different lengths nor a prompt read
in pieces. This cache is in the core attention instead, where keys are already rotated, and each sequence of a batch has
a position of its own.

A `CachedStep` travels to the layers as Megatron's `packed_seq_params`, which the block hands unchanged to every layer.
Each token of a step is written at its own position, and attends to all positions up to it. What padding leaves behind
a sequence is overwritten by that sequence's next tokens before anything attends to it.

Legend: W tokens of a step (the whole, over cp), S this cp rank's part of them, B micro-batch, A query heads and G
key/value heads of this tp rank, D head width, K cached positions, L capacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.parallel.context import gather_sequence, zigzag


@dataclass(slots=True)
class KeyValueCache:
    """Keys and values of one micro-batch, of all layers that this rank holds; a layer's memory is taken at first use.

    With context parallelism every cp rank keeps the whole sequence.
    """

    batch: int
    """B."""
    capacity: int
    """L: positions of each sequence."""
    _layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def of_layer(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The memory of one layer.

        Args:
            layer: Its global number; any number that is the layer's alone will do.
            like: (W, B, G, D) keys, which give heads, width, dtype and device.

        Returns:
            Keys and values, each (B, G, L, D), to be written into. They begin as zeros, so that a position that was
            never written is a finite number behind the mask.
        """
        if layer not in self._layers:
            shape = (self.batch, like.shape[2], self.capacity, like.shape[3])
            self._layers[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[layer]


@dataclass
class CachedStep(PackedSeqParams):
    """One micro-batch's tokens of a step, and where in their sequences they are."""

    cache: KeyValueCache | None = None
    starts: tuple[int, ...] = ()
    """Position of the first token of each of the B sequences."""
    width: int = 0
    """W: tokens of each sequence in this step."""
    wanted: torch.Tensor | None = None
    """int64 (B,) on the device: of which of the W tokens the logits are wanted, one for each sequence."""
    positions: torch.Tensor | None = None
    """int64 (S, B), or (S, 1) where all sequences begin at the same position: positions of this cp rank's tokens."""
    written: torch.Tensor | None = None
    """int64 (B, W): positions of the whole step's tokens; None where all sequences begin at the same position."""
    rows: torch.Tensor | None = None
    """int64 (B,): numbers of the sequences, where `written` is given."""
    mask: torch.Tensor | None = None
    """(B or 1, 1, S, K): 0 where a token attends, minus infinity elsewhere; None where no mask is needed."""

    @classmethod
    def of(
        cls,
        cache: KeyValueCache,
        starts: tuple[int, ...],
        width: int,
        wanted: torch.Tensor,
        *,
        cp: tuple[int, int],
        dtype: torch.dtype,
    ) -> CachedStep:
        """Describe a step.

        Args:
            cache: The micro-batch's cache.
            starts: Position of the first token of each sequence.
            width: W.
            wanted: int64 (B,) on the device, see above.
            cp: Size of the context-parallel axis, and this rank's index on it.
            dtype: Dtype of the queries.

        Returns:
            The step, on the device of `wanted`.
        """
        device = wanted.device
        offsets_S = torch.from_numpy(zigzag((width,), cp[0], cp[1])).to(device)
        ragged = len(set(starts)) > 1
        firsts = torch.tensor(starts if ragged else starts[:1], device=device)
        positions_SB = offsets_S[:, None] + firsts[None, :]
        step = cls(qkv_format="sbhd", cache=cache, starts=starts, width=width, wanted=wanted, positions=positions_SB)
        if ragged:
            step.written = firsts[:, None] + torch.arange(width, device=device)
            step.rows = torch.arange(len(starts), device=device)
        if not step.is_causal(len(offsets_S)) and not step.attends_to_all(len(offsets_S)):
            keys_K = torch.arange(step.stop, device=device)
            hidden = keys_K > positions_SB.T[:, None, :, None]
            step.mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        return step

    @property
    def stop(self) -> int:
        """K: one past the last position that any sequence has after this step."""
        return max(self.starts) + self.width

    def is_causal(self, num_local: int) -> bool:
        """Whether this is a plain causal forward of whole sequences, which needs nothing that was cached before."""
        return not any(self.starts) and num_local == self.width

    def attends_to_all(self, num_local: int) -> bool:
        """Whether the step is a single token at the same place in all sequences, which sees all that is cached."""
        return num_local == self.width == 1 and len(set(self.starts)) == 1

    def keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's keys and values of one layer into the cache.

        Args:
            layer: The layer's number.
            key: (W, B, G, D), rotated; of the whole step, over cp.
            value: (W, B, G, D).

        Returns:
            Keys and values of all positions up to now, each (B, G, K, D), a view of the cache.
        """
        assert self.cache is not None
        assert self.stop <= self.cache.capacity, f"{self.stop} positions in a cache of {self.cache.capacity}"
        kept = self.cache.of_layer(layer, key)
        for memory, new in zip(kept, (key, value), strict=True):
            if self.written is None or self.rows is None:
                memory[:, :, self.starts[0] : self.stop] = new.permute(1, 2, 0, 3)
            else:
                memory.transpose(1, 2)[self.rows[:, None], self.written] = new.transpose(0, 1)
        return kept[0][:, :, : self.stop], kept[1][:, :, : self.stop]


def attend_to_cache(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: CachedStep,
    *,
    scale: float,
    cp_group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Core attention of one layer with a cache. Collective over cp; no gradient flows.

    Args:
        layer: The layer's number.
        query: (S, B, A, D), rotated.
        key: (S, B, G, D), rotated.
        value: (S, B, G, D).
        step: The step.
        scale: Factor of the scores.
        cp_group: The context-parallel group; None without context parallelism.

    Returns:
        (S, B, A * D).
    """
    if cp_group is not None:
        key, value = gather_sequence(key, cp_group), gather_sequence(value, cp_group)
    k_BGKD, v_BGKD = step.keep(layer, key, value)
    q_BASD = query.permute(1, 2, 0, 3)
    out_BASD = F.scaled_dot_product_attention(
        q_BASD,
        k_BGKD,
        v_BGKD,
        attn_mask=step.mask,
        is_causal=step.is_causal(query.shape[0]) and query.shape[0] > 1,
        scale=scale,
        enable_gqa=q_BASD.shape[1] != k_BGKD.shape[1],
    )
    return out_BASD.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def score_scale(config: TransformerConfig, softmax_scale: float | None) -> float:
    """The factor of attention scores.

    Args:
        config: The decoder's or the tower's; gives the width of a head.
        softmax_scale: What the layer spec says, or None.

    Returns:
        The given factor, or one over the square root of a head's width.
    """
    return softmax_scale or 1.0 / math.sqrt(config.kv_channels or config.hidden_size // config.num_attention_heads)


class WithCache(torch.nn.Module):
    """What a core attention of another implementation needs for steps with a cache; comes before it among the bases."""

    def __init__(self, config: TransformerConfig, layer_number: int, **rest: Any) -> None:
        super().__init__(config=config, layer_number=layer_number, **rest)
        self.cache_number = layer_number
        self.cache_scale = score_scale(config, rest.get("softmax_scale"))
        self.cache_cp_group = rest["pg_collection"].cp if config.context_parallel_size > 1 else None

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **rest: Any) -> Any:
        """As the implementation's, except for a step with a cache.

        Args:
            query: (S, B, A, D), rotated.
            key: (S, B, G, D), rotated.
            value: (S, B, G, D).
            *args: The implementation's.
            **rest: The implementation's; a `CachedStep` as `packed_seq_params` is answered here.

        Returns:
            (S, B, A * D).
        """
        step = rest.get("packed_seq_params")
        if not isinstance(step, CachedStep):
            return super().forward(query, key, value, *args, **rest)  # type: ignore[misc]
        return attend_to_cache(
            self.cache_number, query, key, value, step, scale=self.cache_scale, cp_group=self.cache_cp_group
        )


@cache
def with_cache(attention: type) -> type:
    """A core attention, such as Transformer Engine's, that also takes steps with a cache.

    Args:
        attention: Its class, which Megatron builds and calls with named arguments.

    Returns:
        A subclass that differs in such steps alone, without parameters of its own.
    """
    return type(f"Cached{attention.__name__}", (WithCache, attention), {})
