"""Tiny runs whose results are compared between CPU and GPU, and how far they may be apart.

In float32 the bounds are those that layouts of one run keep on the CPU. In bf16 a result is as good as the CPU's own
bf16 is: its distance from the CPU's float32 is at most `SLACK` times that of the CPU's bf16, so no fixed tolerance
hides a mistake that is larger than rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from megatron_deepstack.config.choices import Batching, Layers, Part, Precision, Recompute, Switch, Variant
from megatron_deepstack.config.schema import (
    LanguageConfig,
    LoraConfig,
    ParallelConfig,
    Recipe,
    StackConfig,
)
from megatron_deepstack.testing.compare import worst
from megatron_deepstack.testing.tiny import tiny_model, tiny_recipe
from megatron_deepstack.testing.trial import Trial

LOSS_BOUND: Final = 1e-5
GRADIENT_BOUND: Final = 1e-4
PARAMETER_BOUND: Final = 5e-4
"""Of float32: relative errors of losses, of the first step's gradients, and of parameters after three steps."""
SLACK: Final = 3.0
"""bf16: how many times the CPU's own distance from float32 is allowed; two roundings of other order, and a margin."""
LEAST_DISTANCE: Final = 1e-3
"""bf16: a distance that is always allowed, an eighth of bf16's step, for where the CPU happens to be exact."""

COMPARED: Final = (Precision.FP32, Precision.BF16)


@dataclass(frozen=True, slots=True)
class Distance:
    """How far one run is from another."""

    loss: float
    gradient: float
    parameter: float
    where: str
    """The gradient that is furthest off."""


def local_cases(*, tiny: bool) -> dict[str, Recipe]:
    """Cases of the local layers by name; the first two alone in a tiny trial."""
    model = tiny_model(layers=Layers.LOCAL)
    base = tiny_recipe(model)
    in_vit = replace(model, variant=Variant.DEEPSTACK_V, stacks=StackConfig(start=0))
    cases = {
        "padded": base,
        "packed": _packed(base),
        "full recompute": tiny_recipe(model, ParallelConfig(recompute=Recompute.FULL)),
        "rows on the host": tiny_recipe(model, ParallelConfig(rows_on_host=Switch.ALWAYS)),
        "LoRA": replace(base, lora=LoraConfig(rank=4)),
        "DeepStack-V": tiny_recipe(in_vit),
        "frozen ViT": tiny_recipe(model, trainable=(Part.PROJECTOR, Part.LANGUAGE)),
    }
    return dict(list(cases.items())[:2]) if tiny else cases


def wide_cases(layers: Layers) -> dict[str, Recipe]:
    """Cases of a decoder of width 256, whose sizes suit Transformer Engine's kernels."""
    language = LanguageConfig(vocab_size=512, hidden_size=256, ffn_hidden_size=512, num_layers=4, num_heads=8)
    model = tiny_model(layers=layers, language=language, stacks=StackConfig(slots=(0, 1, 2, 3)))
    base = tiny_recipe(model)
    return {
        "wide, padded": base,
        "wide, packed": _packed(base),
        "wide, full recompute": tiny_recipe(model, ParallelConfig(recompute=Recompute.FULL)),
    }


def in_precision(recipe: Recipe, precision: Precision) -> Recipe:
    """A recipe in another precision.

    Args:
        recipe: The recipe.
        precision: The precision; of bf16 and fp8 the parameters are bf16.

    Returns:
        The recipe, else unchanged.
    """
    return replace(recipe, train=replace(recipe.train, precision=precision))


def _packed(recipe: Recipe) -> Recipe:
    return replace(recipe, train=replace(recipe.train, batching=Batching.PACKED))


def key(name: str, precision: Precision) -> str:
    """The name under which a case's numbers are kept.

    Args:
        name: The case.
        precision: The precision in which it ran.

    Returns:
        The name.
    """
    return f"{name} / {precision}"


def as_document(trial: Trial) -> dict[str, Any]:
    """What is kept of a run: plain values and tensors."""
    return {
        "losses": trial.losses,
        "gradients": trial.first_gradients,
        "parameters": trial.parameters,
    }


def distance(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> Distance:
    """How far one document is from another, relative errors.

    Args:
        actual: As `as_document` gives it.
        expected: Likewise, of the same case.

    Returns:
        The largest errors of losses, gradients and parameters.
    """
    losses = [torch.tensor(document["losses"], dtype=torch.float64) for document in (actual, expected)]
    gradient, where = worst(actual["gradients"], expected["gradients"])
    return Distance(
        loss=float(((losses[0] - losses[1]).abs() / losses[1].abs()).max()),
        gradient=gradient,
        parameter=worst(actual["parameters"], expected["parameters"])[0],
        where=where,
    )


def within_float32(found: Distance) -> bool:
    """Whether a float32 run is the CPU's float32 run. NaN is not."""
    return found.loss <= LOSS_BOUND and found.gradient <= GRADIENT_BOUND and found.parameter <= PARAMETER_BOUND


def within_bf16(found: Distance, of_cpu: Distance) -> bool:
    """Whether a bf16 run is as near to float32 as the CPU's bf16 run.

    Args:
        found: How far the run is from the CPU's float32.
        of_cpu: How far the CPU's own bf16 is from it.

    Returns:
        True if each error is at most `SLACK` times the CPU's, or `LEAST_DISTANCE`. NaN gives False.
    """
    pairs = (
        (found.loss, of_cpu.loss),
        (found.gradient, of_cpu.gradient),
        (found.parameter, of_cpu.parameter),
    )
    return all(ours <= max(SLACK * theirs, LEAST_DISTANCE) for ours, theirs in pairs)
