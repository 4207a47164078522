"""The numbers that the GPU's are compared with: the same cases on this machine's CPU, in a process that sees no GPU."""

from __future__ import annotations

import time
from typing import Any

import torch

from megatron_deepstack.config.choices import Layers
from megatron_deepstack.platform.compute.device import has_gpu
from megatron_deepstack.testing.gpu.cases import COMPARED, as_document, in_precision, key, local_cases, wide_cases
from megatron_deepstack.testing.gpu.report import Report, Settings
from megatron_deepstack.testing.gpu.timing import enter_world
from megatron_deepstack.testing.trial import run_trial


def run(settings: Settings, report: Report) -> None:
    """Run all cases and keep their numbers in one file, which is there once they are whole.

    Args:
        settings: Size and folders of the trial; `expected` is the file.
        report: Gets one row.
    """
    assert not has_gpu(), "the process of the CPU's numbers sees a GPU; it is started with CUDA_VISIBLE_DEVICES empty"
    enter_world(settings)
    cases = local_cases(tiny=settings.tiny)
    if not settings.tiny:
        cases |= wide_cases(Layers.LOCAL)
    begin = time.perf_counter()
    numbers: dict[str, Any] = {}
    for name, recipe in cases.items():
        for precision in COMPARED:
            trial = run_trial(0, in_precision(recipe, precision))
            assert trial is not None
            numbers[key(name, precision)] = as_document(trial)
    partial = settings.expected.with_suffix(".partial")
    torch.save(numbers, partial)
    partial.rename(settings.expected)
    report.measured("runs on the CPU", runs=len(numbers), seconds=time.perf_counter() - begin)
