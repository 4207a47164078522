"""The learning rate over a run, and which part a parameter belongs to."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megatron_deepstack.config.choices import LrSchedule, Part
from megatron_deepstack.config.schema import OptimizerConfig
from megatron_deepstack.training.optim.groups import Rates, part_of
from megatron_deepstack.training.optim.lr import learning_rate

CONFIG = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_fraction=0.1, vision_lr=0.5)


@pytest.mark.parametrize(
    ("schedule", "step", "rate"),
    [
        (LrSchedule.COSINE, 0, 0.1),
        (LrSchedule.COSINE, 9, 1.0),
        (LrSchedule.COSINE, 10, 1.0),
        (LrSchedule.COSINE, 99, 0.1),
        (LrSchedule.LINEAR, 10, 1.0),
        (LrSchedule.LINEAR, 99, 0.1),
        (LrSchedule.CONSTANT, 99, 1.0),
    ],
)
def test_rate(schedule: LrSchedule, step: int, rate: float) -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_fraction=0.1, schedule=schedule)
    assert learning_rate(config, step, 100, 1.0) == pytest.approx(rate)


def test_rate_never_rises_after_warm_up() -> None:
    rates = [learning_rate(CONFIG, step, 100, 1.0) for step in range(100)]
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_one_step_runs() -> None:
    assert learning_rate(OptimizerConfig(lr=1.0, warmup_fraction=0.0), 0, 1, 1.0) == 1.0


@pytest.mark.parametrize(
    ("name", "part", "peak"),
    [
        ("module.vit.decoder.layers.0.mlp.linear_fc1.weight", Part.VISION, 0.5),
        ("module.projector.fc1.bias", Part.PROJECTOR, 1.0),
        ("module.newline", Part.PROJECTOR, 1.0),
        ("module.decoder.layers.0.mlp.linear_fc1.weight", Part.LANGUAGE, 1.0),
        ("module.output_layer.weight", Part.LANGUAGE, 1.0),
    ],
)
def test_part_of_a_parameter(name: str, part: Part, peak: float) -> None:
    assert part_of(name) is part
    assert Rates(CONFIG).peak_lr(part) == peak
