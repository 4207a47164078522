"""Attention of a row of many frames: what Transformer Engine would get, and that it computes what the loop does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.planning.views import ViewGrid
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_qwen3_vl

GRIDS = (ViewGrid(1, 4, 6), ViewGrid(1, 2, 2), ViewGrid(2, 2, 4, moving=True))
BOUNDS = [0, 24, 28, 36, 44]


class Kernel(torch.nn.Module):
    """In the place of Transformer Engine's attention: it takes its arguments, keeps them, and computes the same."""

    calls: list[dict[str, Any]] = []  # noqa: RUF012  # of this process

    def __init__(self, **built: Any) -> None:
        super().__init__()

    def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, **named: Any) -> torch.Tensor:
        packs = named["packed_seq_params"]
        bounds = packs.cu_seqlens_q.tolist()
        self.calls.append({
            "shapes": [tuple(x.shape) for x in (query, key, value)], "mask": attention_mask,
            "kind": named["attn_mask_type"].name, "format": packs.qkv_format, "bounds": bounds,
            "dtype": packs.cu_seqlens_q.dtype, "longest": (packs.max_seqlen_q, packs.max_seqlen_kv),
        })  # fmt: skip
        parts = []
        for begin, end in pairwise(bounds):
            q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
            parts.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
        return torch.cat(parts)


def both_ways(rank: int) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, Any]]]:
    """Features of three views by local layers, and by layers with the kernel's attention."""
    from megatron_deepstack.model.init import random_source
    from megatron_deepstack.model.layers import specs
    from megatron_deepstack.model.layers.megatron_config import vision_config
    from megatron_deepstack.model.rules import fill
    from megatron_deepstack.model.vision.encoder import VisualEncoder
    from megatron_deepstack.model.vision.native import NativeTower
    from megatron_deepstack.model.vision.views import Views
    from megatron_deepstack.model.weights import encoder_rules

    model, groups = tiny_qwen3_vl(), groups_for(ParallelConfig())
    encoder = VisualEncoder(model, Precision.FP32, groups.encoder)
    fill(encoder, encoder_rules(encoder, model), random_source(model, 3), 0, 1)
    drawn = torch.Generator().manual_seed(0)
    sizes = [grid.num_values(model.vision.patch_size, model.vision.temporal_patch_size) for grid in GRIDS]
    views = Views(torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8, generator=drawn), GRIDS)
    config = vision_config(model.vision, Precision.FP32)
    config.engine_layers = True
    real = specs._engine_classes
    specs._engine_classes = lambda: replace(specs._LOCAL, attention=Kernel)
    try:
        tower = NativeTower(config, model, groups.encoder)
    finally:
        specs._engine_classes = real
    tower.load_state_dict(encoder.vit.state_dict())
    Kernel.calls.clear()
    with torch.no_grad():
        return encoder.vit.features(views), tower.features(views), list(Kernel.calls)


def test_the_kernel_gets_all_frames_at_once(ranks: Callable[[int], RankPool]) -> None:
    expected, found, calls = ranks(1).run(both_ways)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    vision = tiny_qwen3_vl().vision
    assert len(calls) == vision.num_layers
    width = vision.hidden_size // vision.num_heads
    for call in calls:
        assert call["shapes"] == [(BOUNDS[-1], vision.num_heads, width)] * 3
        assert (call["format"], call["bounds"], call["dtype"]) == ("thd", BOUNDS, torch.int32)
        assert call["longest"] == (24, 24)
        assert (call["mask"], call["kind"]) == (None, "no_mask")


def test_gradients_pass_to_the_row() -> None:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_deepstack.model.layers.attention import Packs, frame_by_frame

    row = torch.randn(44, 1, 3, 8, requires_grad=True)
    packs = Packs.of(tuple(BOUNDS[1:]), torch.tensor(BOUNDS, dtype=torch.int32)).as_one_row()
    attention = frame_by_frame(Kernel)()
    out = attention(row, row, row, None, attn_mask_type=AttnMaskType.no_mask, packed_seq_params=packs)
    assert out.shape == (44, 1, 24)
    out[24:28].sum().backward()
    assert row.grad is not None
    assert row.grad[24:28].abs().min() > 0
    assert row.grad[:24].abs().max() == row.grad[28:].abs().max() == pytest.approx(0)
