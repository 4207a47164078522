"""Tiny runs on the GPU against the CPU's numbers: local layers in float32 and in bf16."""

from __future__ import annotations

from typing import Any

import torch

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.platform.compute.measure import whole_float32
from megatron_deepstack.testing.gpu.cases import (
    COMPARED,
    GRADIENT_BOUND,
    LOSS_BOUND,
    PARAMETER_BOUND,
    SLACK,
    as_document,
    distance,
    in_precision,
    key,
    local_cases,
    within_bf16,
    within_float32,
)
from megatron_deepstack.testing.gpu.report import Report, Settings
from megatron_deepstack.testing.gpu.timing import enter_world
from megatron_deepstack.testing.trial import run_trial


def run(settings: Settings, report: Report) -> None:
    """Run every case in both precisions. TF32 is off: the factors of its products have ten bits.

    Args:
        settings: Size and folders of the trial, where the CPU's numbers are.
        report: Gets a row for each case and precision.

    Raises:
        FileNotFoundError: As `expected_numbers` does.
    """
    expected = expected_numbers(settings)
    enter_world(settings)
    with whole_float32():
        for name, recipe in local_cases(tiny=settings.tiny).items():
            for precision in COMPARED:
                compare(report, expected, name, in_precision(recipe, precision))


def expected_numbers(settings: Settings) -> dict[str, Any]:
    """The CPU's numbers by case and precision. Raises FileNotFoundError where that part did not end well."""
    if not settings.expected.exists():
        raise FileNotFoundError(f"{settings.expected}: the part cpu_numbers has not left it; see how that part ended")
    numbers: dict[str, Any] = torch.load(settings.expected, weights_only=True)
    return numbers


def compare(report: Report, expected: dict[str, Any], name: str, recipe: Recipe) -> None:
    """Run one case and report how far it is from the CPU's.

    Args:
        report: Gets the row.
        expected: The CPU's numbers, as `expected_numbers` gives them.
        name: The case.
        recipe: The case in the precision in which it is to run.
    """
    precision = recipe.train.precision
    what = f"{name}, {precision}"
    with report.case(what):
        trial = run_trial(0, recipe)
        assert trial is not None
        exact = expected[key(name, Precision.FP32)]
        found = distance(as_document(trial), exact)
        numbers = {"loss": found.loss, "gradient": found.gradient, "parameter": found.parameter}
        if precision is Precision.FP32:
            bounds = f"bounds {LOSS_BOUND:g}, {GRADIENT_BOUND:g}, {PARAMETER_BOUND:g}; worst {found.where}"
            report.judged(what, within_float32(found), bounds, **numbers)
            return
        of_cpu = distance(expected[key(name, Precision.BF16)], exact)
        bounds = (
            f"the CPU's bf16 is at {of_cpu.loss:.2g}, {of_cpu.gradient:.2g}, {of_cpu.parameter:.2g}, of which "
            f"{SLACK:g} times are allowed; worst {found.where}"
        )
        report.judged(what, within_bf16(found, of_cpu), bounds, **numbers)
