"""What stands against CUDA graphs and against overlapped tensor parallelism: each field alone, with the way on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_deepstack.config.check import find_problems
from megatron_deepstack.config.choices import (
    Batching,
    Layers,
    OptIn,
    Precision,
    Recompute,
    RowLength,
    Switch,
)
from megatron_deepstack.config.schema import Recipe

GRAPHS = {"speed.cuda_graphs": OptIn.ALWAYS, "train.row_length": RowLength.FULL}
OVERLAP = {
    "speed.tp_overlap": OptIn.ALWAYS,
    "train.row_length": RowLength.FULL,
    "parallel.tensor": 2,
    "parallel.sequence_parallel": True,
}
REFUSED = {
    "graphs of packed rows": (GRAPHS, {"train.batching": Batching.PACKED}, "train.batching=padded"),
    "graphs of rows of any length": (GRAPHS, {"train.row_length": RowLength.NEEDED}, "train.row_length=full"),
    "graphs and recomputation": (GRAPHS, {"parallel.recompute": Recompute.SELECTIVE}, "parallel.recompute=none"),
    "graphs and the host": (GRAPHS, {"parallel.offload_layers": 1}, "parallel.offload_layers=0"),
    "graphs of two chunks": (GRAPHS, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}, "virtual_pipeline=1"),
    "graphs of a ring": (GRAPHS, {"parallel.context": 2}, "parallel.context=1"),
    "graphs in float32": (GRAPHS, {"train.precision": Precision.FP32}, "train.precision=bf16"),
    "graphs of local layers": (GRAPHS, {"model.layers": Layers.LOCAL}, "model.layers=auto"),
    "graphs and gathering": (
        GRAPHS,
        {"speed.overlap_param_gather": Switch.ALWAYS, "parallel.distributed_optimizer": True},
        "speed.overlap_param_gather=auto",
    ),
    "overlap of one rank": (OVERLAP, {"parallel.tensor": 1, "parallel.sequence_parallel": False}, "parallel.tensor=2"),
    "overlap of whole sequences": (OVERLAP, {"parallel.sequence_parallel": False}, "parallel.sequence_parallel=true"),
    "overlap of rows of any length": (OVERLAP, {"train.row_length": RowLength.NEEDED}, "train.row_length=full"),
    "overlap beside adapters": (OVERLAP, {"lora.rank": 4}, "lora.rank=0"),
    "overlap in float32": (OVERLAP, {"train.precision": Precision.FP32}, "train.precision=bf16"),
    "overlap of local layers": (OVERLAP, {"model.layers": Layers.LOCAL}, "model.layers=auto"),
    "overlap and questions": (OVERLAP, {"evaluation.interval": 5}, "evaluation.interval=0"),
}


def recipe_with(values: dict[str, Any]) -> Recipe:
    recipe = Recipe()
    for path, value in values.items():
        section, field = path.split(".")
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{field: value})})
    return recipe


@pytest.mark.parametrize("settings", [GRAPHS, OVERLAP, GRAPHS | OVERLAP], ids=["graphs", "overlap", "both"])
def test_what_goes_together(settings: dict[str, Any]) -> None:
    assert find_problems(recipe_with(settings)) == []


@pytest.mark.parametrize(("settings", "change", "way_on"), REFUSED.values(), ids=REFUSED)
def test_what_does_not(settings: dict[str, Any], change: dict[str, Any], way_on: str) -> None:
    problems = [one.text for one in find_problems(recipe_with(settings | change)) if "found always" in one.text]
    never = "speed.cuda_graphs=never" if settings is GRAPHS else "speed.tp_overlap=never"
    assert len(problems) == 1
    assert f"use {way_on}" in problems[0] or f"use parallel.{way_on}" in problems[0]
    assert problems[0].endswith(f", or set {never}")
