"""When a run on the GPU counts as the run on the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_deepstack.config.choices import Layers
from megatron_deepstack.testing.gpu.cases import (
    Distance,
    distance,
    local_cases,
    wide_cases,
    within_bf16,
    within_float32,
)


def document(**changes: Any) -> dict[str, Any]:
    plain = {
        "losses": [4.0, 2.0],
        "gradients": {"a": torch.tensor([1.0, 2.0])},
        "parameters": {"a": torch.tensor([1.0, 4.0])},
    }
    return {**plain, **changes}


def test_distance_is_relative_and_names_the_worst_gradient() -> None:
    other = document(losses=[4.0, 2.1], gradients={"a": torch.tensor([1.0, 2.2])})
    found = distance(other, document())
    assert (found.loss, found.gradient, found.parameter) == pytest.approx((0.05, 0.1, 0.0))
    assert found.where == "a"


@pytest.mark.parametrize(
    ("found", "passes"),
    [
        (Distance(0, 0, 0, ""), True),
        (Distance(9e-6, 9e-5, 4e-4, ""), True),
        (Distance(2e-5, 0, 0, ""), False),
        (Distance(0, 2e-4, 0, ""), False),
        (Distance(0, 0, 1e-3, ""), False),
        (Distance(math.nan, 0, 0, ""), False),
        (Distance(0, math.inf, 0, ""), False),
    ],
)
def test_bounds_of_float32(found: Distance, passes: bool) -> None:
    assert within_float32(found) is passes


@pytest.mark.parametrize(
    ("found", "passes"),
    [
        (Distance(3e-4, 0.05, 0.05, ""), True),
        (Distance(3e-4, 0.07, 0.05, ""), False),
        (Distance(2e-3, 0.05, 0.05, ""), False),
        (Distance(math.nan, 0, 0, ""), False),
    ],
    ids=["as near as the CPU's", "gradient off", "loss off", "not a number"],
)
def test_bounds_of_bf16_follow_the_cpu(found: Distance, passes: bool) -> None:
    assert within_bf16(found, Distance(1e-4, 0.02, 0.02, "")) is passes


def test_a_missing_gradient_is_infinitely_wrong() -> None:
    assert not within_float32(distance(document(gradients={}), document()))


def test_cases_say_which_layers_they_are_built_of() -> None:
    assert {recipe.model.layers for recipe in local_cases(tiny=False).values()} == {Layers.LOCAL}
    assert len(local_cases(tiny=False)) == 7
    for layers in (Layers.LOCAL, Layers.TRANSFORMER_ENGINE):
        assert {recipe.model.layers for recipe in wide_cases(layers).values()} == {layers}
