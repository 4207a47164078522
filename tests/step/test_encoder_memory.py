"""What a trained tower keeps of its views, against the arithmetic by which a budget is divided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, VisionConfig
from megatron_deepstack.planning.budget.encoder_views import GIB, view_bytes, views_at_once
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_model

Pools = Callable[[int], RankPool]
VIEWS = 4


def tower(num_layers: int) -> ModelConfig:
    model = tiny_model()
    vision = replace(model.vision, hidden_size=64, ffn_hidden_size=256, num_heads=2, image_size=56, patch_size=14)
    return replace(model, vision=replace(vision, num_layers=num_layers, select_layer=-1))


def kept_bytes(rank: int, precision: Precision, fused: bool, num_layers: int) -> int:
    """Bytes that autograd keeps of the views, parameters left out; a storage counts once."""
    from megatron_deepstack.model.layers.speed import Speed
    from megatron_deepstack.model.vision.encoder import VisualEncoder

    groups = groups_for(ParallelConfig())
    encoder = VisualEncoder(tower(num_layers), precision, groups.encoder, Speed(activation_fusion=fused))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter)
    pixels = torch.randn(VIEWS, 3, 56, 56).to(encoder.config.params_dtype)
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.compiler.set_stance("force_eager"), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        features = encoder.vit(pixels)
    assert features.requires_grad
    own = {parameter.untyped_storage()._cdata for parameter in encoder.parameters()}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_a_view_takes_what_is_said(ranks: Pools, precision: Precision, fused: bool) -> None:
    """Two layers more keep twice a layer. Measured: 0.5 % above the arithmetic, the statistics of norms and softmax."""
    one, three = (ranks(1).run(kept_bytes, precision, fused, layers)[0] for layers in (1, 3))
    model = tower(2)
    said = view_bytes(model.vision, 4 if precision is Precision.FP32 else 2, fused=fused)
    assert said <= (three - one) / VIEWS < 1.02 * said


def test_a_budget_is_divided_by_a_view() -> None:
    vision = VisionConfig()
    one = view_bytes(vision, 2)
    assert one == 577 * 23 * (8 * 1024 + 3 * 4096) * 2  # about 0.54 GB of ViT-L/336
    assert views_at_once(ParallelConfig(), vision, 2) == 0
    assert views_at_once(ParallelConfig(encoder_chunk_views=7), vision, 2) == 7
    assert views_at_once(ParallelConfig(encoder_memory_gib=10), vision, 2) == 10 * GIB // one
    assert views_at_once(ParallelConfig(encoder_memory_gib=0.1), vision, 2) == 1
