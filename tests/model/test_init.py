"""Initial weights: a function of seed and name, with the deviations that the recipe asks for."""

from __future__ import annotations

import math
import os
import zlib

import pytest
import torch

from megatron_deepstack.model.init import random_source
from megatron_deepstack.model.rules import Rule, Shape, Span
from megatron_deepstack.testing.tiny import tiny_model

QUERY, OUTPUT = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"


def test_seed_and_name_decide() -> None:
    """Each of the two changes the numbers; neither depends on what was drawn before."""
    model, shape = tiny_model(), (32, 32)
    first = random_source(model, 1)(QUERY, shape)
    assert torch.equal(first, random_source(model, 1)(QUERY, shape))
    assert not torch.equal(first, random_source(model, 2)(QUERY, shape))
    assert not torch.equal(first, random_source(model, 1)("model.layers.1.self_attn.q_proj.weight", shape))


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        (QUERY, 0.05),
        (OUTPUT, 0.05 / math.sqrt(16)),
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc2.weight", 0.05 / math.sqrt(6)),
        ("model.embed_tokens.weight", 0.05),
    ],
)
def test_deviations(name: str, deviation: float) -> None:
    """Projections that write to the residual stream are smaller by the square root of twice their tower's depth."""
    drawn = random_source(tiny_model(), 0, 0.05)(name, (400, 400))
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.02)


def test_norms_and_biases() -> None:
    source = random_source(tiny_model(), 0)
    assert torch.equal(source("model.layers.0.input_layernorm.weight", (8,)), torch.ones(8))
    assert torch.equal(source("model.norm.weight", (8,)), torch.ones(8))
    assert torch.equal(source("model.mm_projector.0.bias", (8,)), torch.zeros(8))


QKV = tuple(f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv")
MLP = tuple(f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up"))
SPLIT_RULES = {
    "qkv": Rule(names=QKV, shapes=((1536, 40), (768, 40), (768, 40)), groups=12, tp_dim=0),
    "gate_and_up": Rule(names=MLP, shapes=((1032, 40),) * 2, tp_dim=0, concatenated=True),
    "columns": Rule(names=(OUTPUT,), shapes=((600, 2100),), tp_dim=1),
    "vocabulary": Rule(names=("lm_head.weight",), shapes=((1001, 30),), tp_dim=0, padded_rows=1024),
    "no_rows_left": Rule(names=("lm_head.weight",), shapes=((9, 30),), tp_dim=0, padded_rows=16),
    "bias": Rule(names=("model.layers.0.mlp.fc1.bias",), shapes=((1200,),), tp_dim=0),
    "adapter": Rule(names=("model.layers.0.mlp.down_proj.lora_A.weight",), shapes=((8, 2400),), tp_dim=1),
    "not_split": Rule(names=(QUERY,), shapes=((600, 1100),)),
}


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("rule", SPLIT_RULES.values(), ids=SPLIT_RULES)
def test_parts_are_those_of_the_whole(rule: Rule, num_ranks: int) -> None:
    """A rank draws only its part, and gets the numbers that the whole tensor has there."""
    source = random_source(tiny_model(), 3)

    def whole(name: str, shape: Shape) -> torch.Tensor:
        return source(name, shape)

    shards = [rule.shard(source, rank, num_ranks) for rank in range(num_ranks)]
    assert all(torch.equal(shard, rule.shard(whole, rank, num_ranks)) for rank, shard in enumerate(shards)), (
        "a part differs from the whole"
    )
    published = rule.published(shards)
    for name, shape, tensor in zip(rule.names, rule.shapes, published, strict=True):
        assert torch.equal(tensor, source(name, shape)), name


def test_parts_draw_no_other_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = torch.randn

    def counted(*sizes: int, generator: torch.Generator) -> torch.Tensor:
        drawn.append(math.prod(sizes))
        return draw(*sizes, generator=generator)

    monkeypatch.setattr(torch, "randn", counted)
    shape = (4096, 2048)
    random_source(tiny_model(), 0).part(QUERY, shape, Span(0, 512, 1024))
    assert sum(drawn) == 512 * 2048
    drawn.clear()
    random_source(tiny_model(), 0).part(OUTPUT, shape, Span(1, 0, 512))
    assert sum(drawn) == 4096 * 1024


def test_blocks_differ_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the number of threads nor that of ranks on the machine changes what is drawn."""
    shape = (1100, 2100)
    alone = random_source(tiny_model(), 0)(QUERY, shape)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    for ranks in ("1", "2", "16"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert torch.equal(random_source(tiny_model(), 0)(QUERY, shape), alone)
    assert not torch.equal(alone[:512, :1024], alone[512:1024, :1024])
    assert not torch.equal(alone[:512, :1024], alone[:512, 1024:2048])


def test_small_tensors_keep_the_values_of_earlier_releases() -> None:
    """A tensor of one block is drawn from the seed of its name alone, as whole tensors once were."""
    shape = (32, 3, 4, 4)
    generator = torch.Generator().manual_seed(zlib.crc32(b"7/model.mm_projector.0.weight"))
    expected = torch.randn(shape, generator=generator) * 0.02
    assert torch.equal(random_source(tiny_model(), 7)("model.mm_projector.0.weight", shape), expected)
