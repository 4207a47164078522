"""The recipes of the published stages: their resolved text, and what the paper fixes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_deepstack.config.choices import Part, Variant
from megatron_deepstack.config.load import RECIPES, load_recipe, recipe_to_yaml
from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.planning.check import check_plan, check_world
from megatron_deepstack.planning.exchange.rows import context_length
from megatron_deepstack.planning.exchange.vit_stacks import plan_vit_stacks
from megatron_deepstack.planning.slots import decoder_slots, owner, stage_chunks

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(file.stem for file in RECIPES.glob("deepstack_*.yaml"))
BASELINES = sorted(file.stem for file in RECIPES.glob("baseline_*.yaml"))
WHOLE = sorted(file.stem for kind in ("qwen3_vl", "granite4_vision") for file in RECIPES.glob(f"{kind}_*.yaml"))
NODE = 8
RANKS = {"32b": 32, "a3b": 16}
"""Ranks that a recipe is made for, by a word of its name; a node otherwise."""
SAMPLES = {"pretrain": 558_128, "finetune": 665_298}
HD_SAMPLES = 748_000


def test_every_variant_size_and_stage_has_one() -> None:
    variants, sizes, stages = ("l", "v", "hd"), ("7b", "13b"), ("pretrain", "finetune")
    assert sorted(f"deepstack_{v}_{s}_{t}" for v in variants for s in sizes for t in stages) == NAMES
    assert sorted(file.stem for file in GOLDEN.glob("*.yaml")) == sorted(NAMES + BASELINES + WHOLE)


@pytest.mark.parametrize("name", NAMES + BASELINES + WHOLE)
def test_the_resolved_text(name: str) -> None:
    expected = (GOLDEN / f"{name}.yaml").read_text(encoding="utf-8")
    assert recipe_to_yaml(load_recipe(name)) == expected, "if this is meant, run tools/golden_recipes.py"


@pytest.mark.parametrize("name", NAMES + BASELINES + WHOLE)
def test_it_passes_all_checks_on_its_machines(name: str) -> None:
    recipe = load_recipe(name)
    check_plan(recipe)
    check_world(recipe, next((RANKS[word] for word in name.split("_") if word in RANKS), NODE))


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_starts_from_its_folder(name: str) -> None:
    """The template is the model's own, the tokenizer lies in the folder, and Granite's stacks reach a second stage."""
    recipe = load_recipe(name)
    assert recipe.train.init_from == (recipe.data.tokenizer,)
    assert str(recipe.data.template) == {"qwen3": "qwen3_vl", "granite4": "granite_4"}[name.partition("_")[0]]
    assert recipe.run_dir == f"runs/{name.replace('_', '-')}"
    assert bool(recipe.lora.rank) is name.endswith("lora")
    chunks = stage_chunks(recipe.model.language.num_layers, ParallelConfig(pipeline=2))
    owners = [owner(slot, chunks) for slot in decoder_slots(recipe.model)]
    if name.startswith("granite"):
        assert owners == [0, 0, 0, 0, 0, 0, 0, 1]
    else:
        assert set(owners) == {0}


@pytest.mark.parametrize("name", NAMES)
def test_what_the_paper_fixes(name: str) -> None:
    """Table 10 of the paper, slots included; HD's data and start are its own."""
    recipe = load_recipe(name)
    _, variant, size, stage = name.split("_")
    train, optimizer, model = recipe.train, recipe.optimizer, recipe.model
    assert (train.global_batch_size, optimizer.lr) == {"pretrain": (256, 1e-3), "finetune": (128, 2e-5)}[stage]
    samples = HD_SAMPLES if (variant, stage) == ("hd", "finetune") else SAMPLES[stage]
    assert train.steps == math.ceil(samples / train.global_batch_size)
    tunes_vision = stage == "finetune" and variant != "l"
    parts = {
        Part.PROJECTOR,
        *([Part.LANGUAGE] if stage == "finetune" else []),
        *([Part.VISION] if tunes_vision else []),
    }
    assert set(train.trainable) == parts
    assert optimizer.vision_lr == (2e-6 if tunes_vision else None)
    assert (optimizer.warmup_fraction, optimizer.weight_decay, str(optimizer.schedule)) == (0.03, 0.0, "cosine")
    assert (model.language.hidden_size, model.language.num_layers) == {"7b": (4096, 32), "13b": (5120, 40)}[size]
    assert recipe.data.template == {"pretrain": "plain", "finetune": "v1"}[stage]
    assert recipe.run_dir == f"runs/{name.replace('_', '-')}"
    assert model.variant == {"l": Variant.DEEPSTACK_L, "v": Variant.DEEPSTACK_V, "hd": Variant.DEEPSTACK_HD}[variant]
    if variant == "v":
        assert plan_vit_stacks(model).slots == (20, 21, 22, 23)
    else:
        assert decoder_slots(model) == (1, 2, 3, 4)
    assert context_length(model, (2, 2)) == (2928 if variant == "hd" else 576)
    assert train.seq_length == (4096 if variant == "hd" else 2048)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("finetune") and "_hd_" not in name])
def test_the_second_stage_starts_from_the_first(name: str) -> None:
    assert load_recipe(name).train.init_from == (f"exports/{name.replace('_', '-').replace('finetune', 'pretrain')}",)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("baseline_llava", 576), ("baseline_anyres", 576 + 48 * 49), ("baseline_in_sequence", 2880)],
)
def test_baselines_differ_in_the_context_alone(name: str, tokens: int) -> None:
    """The same training as DeepStack-L's, on the same store, without stacks."""
    baseline, stacked = load_recipe(f"{name}_7b_finetune"), load_recipe("deepstack_l_7b_finetune")
    assert context_length(baseline.model, (2, 2)) == tokens
    assert decoder_slots(baseline.model) == ()
    assert (baseline.data, baseline.optimizer) == (stacked.data, stacked.optimizer)
    assert baseline.train.trainable == stacked.train.trainable
