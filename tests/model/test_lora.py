"""Adapters as modules: which linears get one, from which classes, and how they begin."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron.core.extensions
import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from safetensors.torch import save_file

from megatron_deepstack.config.choices import LoraTarget, Part
from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.config.schema import LanguageConfig, LoraConfig, ParallelConfig, Recipe, TrainConfig
from megatron_deepstack.convert.published import published_source
from megatron_deepstack.errors import CheckpointError, ConfigError, LayoutError
from megatron_deepstack.model.init import random_source
from megatron_deepstack.model.layers import specs
from megatron_deepstack.model.layers.lora import AdaptedLinear, WithAdapter, adapted, is_adapter
from megatron_deepstack.planning.check import check_plan
from megatron_deepstack.testing.tiny import tiny_model

LORA = LoraConfig(rank=4, targets=(LoraTarget.QKV, LoraTarget.MLP_OUT))
A, B = "model.layers.2.self_attn.qkv_proj.lora_A.weight", "model.layers.2.self_attn.q_proj.lora_B.weight"


def test_only_targets_are_adapted_and_without_a_rank_none() -> None:
    assert issubclass(adapted(ColumnParallelLinear, LoraTarget.QKV, LORA), AdaptedLinear)
    assert adapted(ColumnParallelLinear, LoraTarget.MLP_IN, LORA) is ColumnParallelLinear
    assert adapted(ColumnParallelLinear, LoraTarget.QKV, LoraConfig()) is ColumnParallelLinear
    assert adapted(ColumnParallelLinear, LoraTarget.QKV, LORA) is adapted(ColumnParallelLinear, LoraTarget.QKV, LORA)


class Column(torch.nn.Module):
    """In place of Transformer Engine's."""


class Row(torch.nn.Module):
    """In place of Transformer Engine's."""


def test_transformer_engines_linears_are_adapted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norm and linear are apart, so that A sees what the linear sees. The engine itself is not run here."""
    engine = SimpleNamespace(
        TENorm=torch.nn.RMSNorm,
        TEColumnParallelLinear=Column,
        TERowParallelLinear=Row,
        TEDotProductAttention=torch.nn.Identity,
    )
    monkeypatch.setattr(megatron.core.extensions, "transformer_engine", engine, raising=False)
    monkeypatch.setattr(specs, "uses_transformer_engine", lambda layers: True)
    layer = specs._engine_submodules(LanguageConfig(), LORA)
    attention = layer.self_attention.submodules
    assert layer.input_layernorm is torch.nn.RMSNorm
    assert attention.linear_qkv.__mro__[1:4] == (AdaptedLinear, WithAdapter, Column)
    assert attention.linear_proj is Row
    assert issubclass(attention.core_attention, torch.nn.Identity)
    mlp: Any = layer.mlp
    inside = mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]
    assert inside.linear_fc1 is Column
    assert inside.linear_fc2.__mro__[1:4] == (AdaptedLinear, WithAdapter, Row)


def test_a_begins_uniform_and_b_zero() -> None:
    source = random_source(tiny_model(), 3)
    drawn = source(A, (8, 4096))
    bound = 1 / math.sqrt(4096)
    assert float(drawn.abs().max()) <= bound
    assert float(drawn.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert torch.equal(drawn, random_source(tiny_model(), 3)(A, (8, 4096)))
    assert not source(B, (32, 4)).any()
    assert is_adapter(A)
    assert is_adapter("decoder.layers.0.mlp.linear_fc1.lora_b_gate")
    assert not is_adapter("model.layers.2.self_attn.q_proj.weight")


def test_a_checkpoint_of_the_base_model_leaves_adapters_to_the_run(tmp_path: Path) -> None:
    """A decoder on disk that lacks a matrix is refused; that it lacks adapters is as it should be."""
    base = "model.layers.2.self_attn.q_proj.weight"
    save_file({base: torch.ones(32, 32)}, tmp_path / "model.safetensors")
    source = published_source(tmp_path / "model.safetensors", fallback=random_source(tiny_model(), 3))
    assert torch.equal(source(base, (32, 32)), torch.ones(32, 32))
    assert torch.equal(source(A, (4, 32)), random_source(tiny_model(), 3)(A, (4, 32)))
    with pytest.raises(CheckpointError, match=r"holds no tensor model\.layers\.2\.self_attn\.k_proj\.weight"):
        source(base.replace("q_proj", "k_proj"), (32, 32))


def test_adapters_that_could_never_learn_are_refused() -> None:
    with pytest.raises(ConfigError, match="adapters would never learn; add it"):
        load_recipe("demo", ["lora.rank=4", "train.trainable=[projector]"])
    empty = Recipe(lora=LORA, train=TrainConfig(trainable=(Part.LANGUAGE,)))
    check_plan(empty)
    stages = ParallelConfig(pipeline=2, layers_per_stage=(0, 32))
    with pytest.raises(LayoutError, match="give each stage at least one layer"):
        check_plan(Recipe(lora=LORA, parallel=stages))
