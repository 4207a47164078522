"""Ranges and rules between fields: each is broken once, and named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_deepstack.config.check import find_problems, require
from megatron_deepstack.config.fields import leaves
from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.config.schema import DataConfig, LanguageConfig, ModelConfig, ParallelConfig, Recipe
from megatron_deepstack.errors import ConfigError, LayoutError


@pytest.fixture
def found(tmp_path: Path) -> Callable[[dict[str, object]], ConfigError]:
    """The error that fields with these values end in."""

    def problems(values: dict[str, object]) -> ConfigError:
        file = tmp_path / "defaults.yaml"
        file.touch()
        with pytest.raises(ConfigError) as caught:
            load_recipe(file, [f"{path}={json.dumps(value)}" for path, value in values.items()])
        return caught.value

    return problems


RANGED = {field.path: field for field in leaves(Recipe) if field.type.range is not None}


@pytest.mark.parametrize("path", RANGED)
def test_each_range_is_checked(found, path):
    kind = RANGED[path].type
    bad = [-1] * (kind.length or 1) if kind.many else -1
    (problem,) = found({path: bad}).problems
    assert problem.startswith(f"{path}: found ")
    assert f"expected {kind.range}" in problem
    assert problem.endswith(f"({kind.unit})" if kind.unit else str(kind.range))


RULES = {
    "two bounds of the tower": (
        {"parallel.encoder_chunk_views": 4, "parallel.encoder_memory_gib": 2.5},
        "parallel.encoder_memory_gib: 2.5 GiB and 4 views both bound the tower's activations; set one of them to 0",
    ),
    "rows on the host without rows": (
        {"parallel.rows_on_host": "always", "parallel.encoder_placement": "inline"},
        "parallel.rows_on_host: always keeps received rows on the host, and inline receives none; set auto, or use",
    ),
    "overlap of one chunk": (
        {"speed.overlap_p2p": "always"},
        "speed.overlap_p2p: always is impossible here: a stage has one chunk (parallel.virtual_pipeline is 1); use",
    ),
    "overlap of copies": (
        {"speed.overlap_param_gather": "always"},
        "speed.overlap_param_gather: always is impossible here: parameters are gathered only under",
    ),
    "gathering without buckets": (
        {
            "speed.overlap_param_gather": "always",
            "parallel.distributed_optimizer": True,
            "parallel.overlap_grad_reduce": False,
        },
        "it needs the buckets of parallel.overlap_grad_reduce, which is false; use auto",
    ),
    "accumulation of frozen matrices": (
        {"speed.gradient_accumulation_fusion": "always", "lora.rank": 8},
        "speed.gradient_accumulation_fusion: always is impossible here: LoRA freezes the decoder's matrices; use auto",
    ),
    "bf16 gradients of a float32 loss": (
        {"speed.fusions": "always", "train.precision": "fp32"},
        "speed.cross_entropy_fusion: always is impossible here: its gradients are bf16, and train.precision is fp32",
    ),
    "bf16 sums of float32 gradients": (
        {"speed.gradient_dtype": "bf16", "train.precision": "fp32"},
        "speed.gradient_dtype: found bf16 under train.precision fp32, whose parameters need float32 gradients; use",
    ),
    "moments of copies": (
        {"optimizer.moment_dtype": "bf16", "optimizer.beta2": 0.95},
        "optimizer.moment_dtype: found bf16, which needs Megatron's distributed optimizer; set parallel.distributed",
    ),
    "moments in float32": (
        {
            "optimizer.moment_dtype": "bf16",
            "optimizer.beta2": 0.95,
            "parallel.distributed_optimizer": True,
            "train.precision": "fp32",
        },
        "optimizer.moment_dtype: found bf16 under train.precision fp32, where all of training is float32; use fp32",
    ),
    "moments that rounding holds": (
        {"optimizer.moment_dtype": "bf16", "parallel.distributed_optimizer": True},
        "optimizer.moment_dtype: found bf16 and beta2 0.999: a step changes a moment by 0.001 of its value, and "
        "rounding to bf16 takes back changes below 0.0039; use fp32, or beta2 of at most 0.996, such as 0.95",
    ),
    "nothing to recompute": (
        {"parallel.recompute": "selective", "parallel.recompute_modules": []},
        "parallel.recompute_modules: is empty, and recompute is selective; name at least one of core_attn, mlp",
    ),
    "norms to compute again in 8 bits": (
        {
            "parallel.recompute": "selective",
            "parallel.recompute_modules": ["layernorm"],
            "train.precision": "fp8",
        },
        "parallel.recompute_modules: found layernorm under fp8, where linears keep their input in 8 bits and not what",
    ),
    "experts to compute again that are not there": (
        {"parallel.recompute": "selective", "parallel.recompute_modules": ["moe_act"]},
        "parallel.recompute_modules: found moe_act, and no layer of the decoder has experts; leave it out",
    ),
    "nothing to keep on the host": (
        {"parallel.recompute": "full", "parallel.offload_layers": 4},
        "parallel.offload_layers: found 4 under recompute=full, which keeps nothing of layers but their input; use "
        "parallel.recompute=none or selective, or set parallel.offload_layers=0",
    ),
    "8-bit weights on the host": (
        {"train.precision": "fp8", "parallel.offload_layers": 4},
        "parallel.offload_layers: found 4 under fp8, where layers keep 8-bit copies of weights among their",
    ),
    "no whole patch": (
        {"model.vision.image_size": 13},
        "model.vision.image_size: a view of 13 pixels holds no patch of 14; use 14 pixels or more",
    ),
    "ViT heads": ({"model.vision.num_heads": 15}, "model.vision.num_heads: 15 heads do not divide"),
    "feature outside the tower": (
        {"model.vision.select_layer": -25},
        "model.vision.select_layer: found -25, expected -1 (the last layer's output) to -24",
    ),
    "decoder heads": ({"model.language.num_heads": 33}, "33 heads do not divide model.language.hidden_size 4096"),
    "odd head": ({"model.language.head_dim": 3}, "model.language.head_dim: a head is 3 wide"),
    "key/value heads": ({"model.language.num_kv_heads": 5}, "5 key/value heads do not divide model.language.num_heads"),
    "no grid of crops": ({"model.stacks.num_crops": 1}, "1 leaves no grid of crops under grid rule best_fit"),
    "few for 2x2": (
        {"model.stacks.num_crops": 3, "model.stacks.grid": "fixed_2x2"},
        "3 leaves no grid of crops under grid rule fixed_2x2, which needs at least 4",
    ),
    "crops of the ViT's stacks": (
        {"model.variant": "deepstack_v"},
        "model.stacks.grid: best_fit gives images different numbers of crops, and deepstack_v needs four of each",
    ),
    "batch": (
        {"train.global_batch_size": 7, "train.micro_batch_size": 2},
        "train.global_batch_size: 7 is not a multiple of train.micro_batch_size 2",
    ),
    "image longer than sequence": ({"train.seq_length": 576}, "576 tokens cannot hold one image of 576 visual tokens"),
    "nothing learns": ({"train.trainable": []}, "train.trainable: found [], expected at least one of"),
    "part twice": ({"train.trainable": ["vision", "vision"]}, "train.trainable: found [vision, vision]"),
    "lowest above highest": ({"optimizer.min_lr": 1.0}, "optimizer.min_lr: 1.0 is above the peak optimizer.lr"),
    "validation of nothing": ({"train.validation_interval": 5}, "data.validation_store, which is not set"),
    "evaluation of nothing": ({"evaluation.interval": 5, "data.tokenizer": "t"}, "and no questions are named; set"),
    "evaluation without words": (
        {"evaluation.interval": 5, "evaluation.store": "s"},
        "evaluation.interval: asks questions every 5 steps, and data.tokenizer, which writes answers, is not set",
    ),
    "two sources of questions": (
        {"evaluation.file": "q.jsonl", "evaluation.store": "s"},
        "evaluation.file: both are set, and questions come from one of them",
    ),
    "pictures without questions": ({"evaluation.images": "p"}, "evaluation.images: is set without evaluation.file"),
    "evaluation in 8 bits": (
        {"evaluation.interval": 5, "evaluation.store": "s", "data.tokenizer": "t", "train.precision": "fp8"},
        "one token at a time, which 8-bit layers do not take; use train.precision=bf16",
    ),
    "no score": ({"evaluation.metric": "bleu"}, "evaluation.metric: found 'bleu', expected one of exact_match, "),
    "template": ({"data.template": "v11"}, "data.template: found 'v11', expected one of plain, v1"),
    "no name": ({"name": "  "}, "name: is empty, expected text"),
}


@pytest.mark.parametrize(("settings", "message"), RULES.values(), ids=RULES)
def test_rules_between_fields(found, settings, message):
    (problem,) = found(settings).problems
    assert message in problem


LAYOUTS = {
    "heads": ({"tensor": 64}, "64 tensor-parallel ranks do not divide model.language.num_heads 32; use 32"),
    "key/value heads": ({"tensor": 8}, "8 tensor-parallel ranks do not divide model.language.num_kv_heads 4; use 4"),
    "chunks without stages": ({"virtual_pipeline": 2}, "2 chunks per stage need at least 2 pipeline stages"),
    "sequence without tensor": ({"sequence_parallel": True}, "splits activations over tensor-parallel ranks"),
    "inline under context": ({"context": 2, "encoder_placement": "inline"}, "split over 2 context-parallel"),
    "bounded views inline": (
        {"encoder_chunk_views": 25, "encoder_placement": "inline"},
        "parallel.encoder_chunk_views: 25 bounds nothing under inline, which keeps the activations of all views",
    ),
    "sequence shards": ({"context": 3}, "train.seq_length: 2048 tokens do not split into 6 equal shards"),
}


@pytest.mark.parametrize(("parallel", "message"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(found, parallel, message):
    layout = {f"parallel.{field}": value for field, value in parallel.items()}
    error = found({"model.language.num_kv_heads": 4, **layout})
    assert type(error) is LayoutError
    assert any(message in problem for problem in error.problems)


def test_a_layout_and_another_problem_are_a_config_error(found):
    error = found({"parallel.virtual_pipeline": 2, "optimizer.beta1": 1.0})
    assert type(error) is ConfigError
    assert len(error.problems) == 2


def test_a_rule_is_silent_where_a_range_is_broken(found):
    error = found({"model.vision.patch_size": 0, "model.language.num_heads": 0})
    assert [problem.partition(":")[0] for problem in error.problems] == [
        "model.vision.patch_size",
        "model.language.num_heads",
    ]


def test_problems_of_a_sound_recipe_are_none():
    assert find_problems(Recipe()) == []


def test_tensor_parallelism_takes_any_vocabulary():
    """Its rows are filled up to a multiple of the ranks."""
    recipe = Recipe(model=ModelConfig(language=LanguageConfig(vocab_size=100353)), parallel=ParallelConfig(tensor=8))
    assert find_problems(recipe) == []


def test_required_fields():
    with pytest.raises(ConfigError, match=r"data\.store: is not set, and `train` needs it"):
        require(Recipe(), ("data.store",), "train")
    require(Recipe(data=DataConfig(store="s")), ("data.store",), "train")
    with pytest.raises(ConfigError, match=r"data\.records: is not set"):
        require(Recipe(data=DataConfig(records=())), ("data.records",), "preprocess")


def test_config_and_planning_import_no_torch():
    code = (
        "import sys, megatron_deepstack.config.load, megatron_deepstack.planning.check;"
        "sys.exit(', '.join({'torch', 'numpy', 'ray', 'transformers', 'megatron'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
