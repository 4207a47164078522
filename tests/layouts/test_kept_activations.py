"""What autograd keeps between the passes changes no bit of a run: norms computed again, activations on the host."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_training_layouts import rows

from megatron_deepstack.config.choices import Batching, Part, Precision, Recompute, RecomputeModule
from megatron_deepstack.config.schema import LoraConfig, ModelConfig, ParallelConfig, Recipe
from megatron_deepstack.config.sizes import answering_layout
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.model.layers.megatron_config import DecoderConfig, decoder_config, vision_config
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_model, tiny_qwen3_vl_moe, tiny_recipe
from megatron_deepstack.testing.trial import Trial, run_trial

Pools = Callable[[int], RankPool]
SELECTIVE, NORM, MLP = Recompute.SELECTIVE, RecomputeModule.LAYER_NORM, RecomputeModule.MLP


def norms(*modules: RecomputeModule, **layout: object) -> ParallelConfig:
    return ParallelConfig(recompute=SELECTIVE, recompute_modules=(NORM, *modules), **layout)  # type: ignore[arg-type]


def moved(layers: int, **layout: object) -> ParallelConfig:
    return ParallelConfig(offload_layers=layers, offload_above_mib=0.0, **layout)  # type: ignore[arg-type]


def packed(recipe: Recipe) -> Recipe:
    return replace(recipe, train=replace(recipe.train, batching=Batching.PACKED))


def adapted(recipe: Recipe) -> Recipe:
    train = replace(recipe.train, trainable=(Part.PROJECTOR, Part.LANGUAGE))
    return replace(recipe, train=train, lora=LoraConfig(rank=3, alpha=6.0))


def frozen(recipe: Recipe) -> Recipe:
    return replace(recipe, train=replace(recipe.train, trainable=(Part.PROJECTOR,)))


def plain(recipe: Recipe) -> Recipe:
    return recipe


DENSE, EXPERTS = tiny_model(), tiny_qwen3_vl_moe(dense_layers=(0,))
SEQUENCE = {"tensor": 2, "sequence_parallel": True}
BOTH = replace(norms(MLP), offload_layers=100, offload_above_mib=0.0)
CASES = [
    ("norms", 1, norms(), DENSE, plain),
    ("norms-tp2-sp", 2, norms(**SEQUENCE), DENSE, plain),
    ("norms-mlp-pp2-packed", 2, norms(MLP, pipeline=2), DENSE, packed),
    ("norms-lora", 1, norms(), DENSE, adapted),
    ("norms-frozen", 1, norms(), DENSE, frozen),
    ("norms-experts", 1, norms(), EXPERTS, plain),
    ("norms-mlp-experts", 1, norms(MLP), EXPERTS, packed),
    ("host", 1, moved(2), DENSE, plain),
    ("host-all-packed", 1, moved(100), DENSE, packed),
    ("host-tp2-sp", 2, moved(100, **SEQUENCE), DENSE, plain),
    ("host-pp2-packed", 2, moved(1, pipeline=2), DENSE, packed),
    ("host-pp2-vpp2", 2, moved(100, pipeline=2, virtual_pipeline=2), DENSE, plain),
    ("host-lora", 1, moved(100), DENSE, adapted),
    ("host-experts", 1, moved(100), EXPERTS, plain),
    ("host-norms-mlp", 1, BOTH, DENSE, packed),
    ("host-norms-mlp-tp2-sp", 2, replace(BOTH, **SEQUENCE), DENSE, plain),
]
QUICK = {"norms-tp2-sp", "host-pp2-packed", "host-norms-mlp"}


@pytest.mark.parametrize(("num_ranks", "parallel", "model", "change"), rows(CASES, QUICK))
def test_no_bit_of_a_run_changes(
    ranks: Pools, num_ranks: int, parallel: ParallelConfig, model: ModelConfig, change: Callable[[Recipe], Recipe]
) -> None:
    changed = change(tiny_recipe(model, parallel))
    kept = replace(parallel, recompute=Recompute.NONE, offload_layers=0)
    expected: Trial = ranks(num_ranks).run(run_trial, replace(changed, parallel=kept))[0]
    actual: Trial = ranks(num_ranks).run(run_trial, changed)[0]
    assert actual.losses == expected.losses
    for name, value in expected.first_gradients.items():
        assert torch.equal(actual.first_gradients[name], value), f"gradient {name} of the first step"
    for name, value in expected.parameters.items():
        assert torch.equal(actual.parameters[name], value), f"parameter {name} after the last step"


def built(modules: tuple[str, ...], model: ModelConfig, *, engine: bool, rank: int = 0) -> DecoderConfig:
    parallel = ParallelConfig(recompute=SELECTIVE, recompute_modules=tuple(map(RecomputeModule, modules)))
    return decoder_config(model.language, parallel, Precision.BF16, engine=engine, lora=LoraConfig(rank=rank))


def test_parts_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="layernorm finds no norm to compute again: Transformer Engine's layers"):
        built(("layernorm",), DENSE, engine=True)
    with pytest.raises(ConfigError, match="moe_act needs experts in grouped products, by Transformer Engine"):
        built(("moe_act",), EXPERTS, engine=False)


def test_what_megatron_is_told() -> None:
    """Norms are not its task; experts as a whole leave nothing of their activation."""
    assert built(("layernorm",), DENSE, engine=False).recompute_granularity is None
    assert built(("layernorm",), EXPERTS, engine=True).kept.norms_again
    assert built(("layernorm", "mlp"), DENSE, engine=True, rank=4).recompute_modules == ["mlp"]
    assert built(("moe_act", "mlp"), EXPERTS, engine=True).recompute_modules == ["mlp", "moe"]
    assert built(("moe_act", "layernorm"), EXPERTS, engine=True).recompute_modules == ["moe_act"]


def test_a_config_is_made_without_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder_config(DENSE.language, ParallelConfig(), Precision.BF16)
        vision_config(DENSE.vision, Precision.BF16)


def test_answers_are_given_without_either() -> None:
    asked = answering_layout(replace(BOTH, tensor=2))
    assert (asked.tensor, asked.recompute, asked.offload_layers) == (2, Recompute.NONE, 0)
