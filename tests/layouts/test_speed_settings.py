"""Fusions, overlaps and recomputation change no result: each against the same run without, on real ranks.

Functions that are compiled on a GPU run as they are written here; tests/model/test_speed.py compiles one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_training_layouts import rows

from megatron_deepstack.config.choices import GradientDtype, Precision, Recompute, RecomputeModule, Switch
from megatron_deepstack.config.schema import ParallelConfig, Recipe, SpeedConfig
from megatron_deepstack.testing.compare import worst
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_model, tiny_recipe
from megatron_deepstack.testing.trial import Trial, run_trial

Pools = Callable[[int], RankPool]


def run_uncompiled(rank: int, recipe: Recipe) -> Trial | None:
    from megatron_deepstack.model import build
    from megatron_deepstack.platform.compute.capabilities import Capabilities

    asked = build.capabilities
    build.capabilities = lambda: Capabilities(
        gpu=False, engine_problem="not here", apex_gradients=False, compiler_problem=None
    )
    try:
        with torch.compiler.set_stance("force_eager"):
            return run_trial(rank, recipe)
    finally:
        build.capabilities = asked


ZERO = ParallelConfig(distributed_optimizer=True)
RECOMPUTED = (RecomputeModule.CORE_ATTENTION, RecomputeModule.MLP)
EXACT = [
    ("overlapped-p2p", 2, ParallelConfig(pipeline=2, virtual_pipeline=2), {"overlap_p2p": Switch.ALWAYS}),
    ("overlapped-gather", 2, ZERO, {"overlap_param_gather": Switch.ALWAYS}),
    (
        "attention-and-mlp-again",
        2,
        ParallelConfig(pipeline=2, recompute=Recompute.SELECTIVE, recompute_modules=RECOMPUTED),
        {},
    ),
    ("activation", 2, ParallelConfig(tensor=2), {"activation_fusion": Switch.ALWAYS}),
    ("optimizer", 1, ParallelConfig(), {"optimizer_fusion": Switch.ALWAYS}),
]


@pytest.mark.parametrize(
    ("num_ranks", "parallel", "speed"), rows(EXACT, {"overlapped-p2p", "overlapped-gather", "activation"})
)
def test_float32_results_are_the_same(
    ranks: Pools, num_ranks: int, parallel: ParallelConfig, speed: dict[str, Switch]
) -> None:
    plain = tiny_recipe(tiny_model(), replace(parallel, recompute=Recompute.NONE))
    plain = replace(plain, speed=SpeedConfig(fusions=Switch.NEVER))
    changed = replace(plain, parallel=parallel, speed=replace(plain.speed, **speed))
    expected: Trial = ranks(num_ranks).run(run_uncompiled, plain)[0]
    actual: Trial = ranks(num_ranks).run(run_uncompiled, changed)[0]
    error, name = worst(actual.parameters, expected.parameters)
    # Measured: overlaps and recomputation equal to the last bit; the activation 3e-7 of the largest parameter, the
    # fused optimizer 2e-7 of it and 5e-8 of a loss.
    assert actual.losses == pytest.approx(expected.losses, rel=1e-6)
    assert error <= 1e-5, f"parameter {name} after three steps"


ROUNDED = [
    ("cross-entropy", 2, ParallelConfig(tensor=2), {"cross_entropy_fusion": Switch.ALWAYS}),
    ("bf16-gradients", 2, ZERO, {"gradient_dtype": GradientDtype.BF16}),
]


@pytest.mark.parametrize(("num_ranks", "parallel", "speed"), rows(ROUNDED, set()))
def test_bf16_results_differ_by_rounding(
    ranks: Pools, num_ranks: int, parallel: ParallelConfig, speed: dict[str, object]
) -> None:
    plain = tiny_recipe(tiny_model(), parallel)
    train = replace(plain.train, precision=Precision.BF16)
    plain = replace(plain, train=train, speed=SpeedConfig(fusions=Switch.NEVER))
    changed = replace(plain, speed=replace(plain.speed, **speed))
    expected: Trial = ranks(num_ranks).run(run_uncompiled, plain)[0]
    actual: Trial = ranks(num_ranks).run(run_uncompiled, changed)[0]
    # Measured: cross-entropy equal to the last bit, bf16 sums of gradients 3e-5 of a loss.
    assert actual.losses == pytest.approx(expected.losses, rel=1e-3)
