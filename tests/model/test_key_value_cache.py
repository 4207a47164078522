"""Attention over cached keys and values equals attention over whole sequences, in whatever steps they come."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_deepstack.model.layers.key_value_cache import (
    CachedStep,
    KeyValueCache,
    attend_to_cache,
    score_scale,
    with_cache,
)

HEADS, KV_HEADS, WIDTH = 4, 2, 8
SCALE = WIDTH**-0.5


def draw(length: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of one sequence: (length, heads, D)."""
    return tuple(torch.randn(length, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))


def whole(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(length, heads * D) of plain causal attention."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


STEPS = {
    "at once": [9],
    "token by token": [1] * 9,
    "prompt, then tokens": [5, 1, 1, 1, 1],
    "pieces": [2, 4, 3],
}


@pytest.mark.parametrize("ahead", [0, 3], ids=["in step", "one sequence ahead"])
@pytest.mark.parametrize("widths", STEPS.values(), ids=STEPS)
def test_steps_give_what_whole_sequences_give(widths: list[int], ahead: int) -> None:
    """The second sequence is `ahead` tokens longer before the steps begin; those tokens are read in a step before."""
    torch.manual_seed(0)
    first, second = draw(9), draw(9 + ahead)
    cache, none = KeyValueCache(2, 16), torch.zeros(2, dtype=torch.int64)
    if ahead:
        early = [torch.stack([a[:ahead], b[:ahead]], 1) for a, b in zip(first, second, strict=True)]
        step = CachedStep.of(cache, (0, 0), ahead, none, cp=(1, 0), dtype=torch.float32)
        attend_to_cache(1, *early, step, scale=SCALE, cp_group=None)
    found, at = [], 0
    for width in widths:
        parts = [
            torch.stack([a[at : at + width], b[at + ahead : at + ahead + width]], 1)
            for a, b in zip(first, second, strict=True)
        ]
        step = CachedStep.of(cache, (at, at + ahead), width, none, cp=(1, 0), dtype=torch.float32)
        found.append(attend_to_cache(1, *parts, step, scale=SCALE, cp_group=None))
        at += width
    together = torch.cat(found)
    torch.testing.assert_close(together[:, 0], whole(*first))
    torch.testing.assert_close(together[:, 1], whole(*second)[ahead:])


def test_a_layer_has_memory_of_its_own() -> None:
    cache = KeyValueCache(1, 4)
    like = torch.zeros(1, 1, KV_HEADS, WIDTH)
    assert cache.of_layer(1, like)[0] is cache.of_layer(1, like)[0]
    assert cache.of_layer(1, like)[0] is not cache.of_layer(2, like)[0]


class OtherAttention(torch.nn.Module):
    """Stands for Transformer Engine's."""

    def __init__(self, config: Any, layer_number: int, pg_collection: Any, softmax_scale: float | None = None) -> None:
        super().__init__()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **rest: Any) -> str:
        return f"other with {rest['packed_seq_params']}"


def test_another_attention_takes_steps_with_a_cache_too() -> None:
    config: Any = SimpleNamespace(kv_channels=WIDTH, context_parallel_size=1)
    layer = with_cache(OtherAttention)(config=config, layer_number=3, pg_collection=SimpleNamespace(cp=None))
    torch.manual_seed(0)
    sequence = draw(5)
    batch = [part[:, None] for part in sequence]
    assert layer(*batch, packed_seq_params=None) == "other with None"
    step = CachedStep.of(
        KeyValueCache(1, 5), (0,), 5, torch.zeros(1, dtype=torch.int64), cp=(1, 0), dtype=torch.float32
    )
    torch.testing.assert_close(layer(*batch, packed_seq_params=step)[:, 0], whole(*sequence))
    assert not layer.state_dict()
    assert with_cache(OtherAttention) is with_cache(OtherAttention)
    assert score_scale(config, None) == pytest.approx(SCALE)
