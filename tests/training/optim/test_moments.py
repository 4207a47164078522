"""Moments in bf16: why `optimizer.beta2` has a bound, and what a machine must have."""

from __future__ import annotations

import pytest
import torch

from megatron_deepstack.config.choices import MomentDtype, Precision
from megatron_deepstack.config.schema import OptimizerConfig, ParallelConfig
from megatron_deepstack.config.speed_rules import moment_violations
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.platform.compute.capabilities import Capabilities
from megatron_deepstack.training.optim.optimizer import require_moments

LOW = OptimizerConfig(moment_dtype=MomentDtype.BF16, beta2=0.95)
H100 = Capabilities(gpu=True, engine_problem=None, apex_gradients=False, compiler_problem=None)


@pytest.mark.parametrize("start", [1.0, 1.3, 1.99])
@pytest.mark.parametrize("beta2", [0.9, 0.95, 0.996, 0.997, 0.999])
def test_moments_fall_where_the_rule_allows_them(start: float, beta2: float) -> None:
    """The second moment of gradients that have become zero, step by step; without rounding it would halve."""
    allowed = not list(
        moment_violations(
            OptimizerConfig(moment_dtype=MomentDtype.BF16, beta2=beta2),
            ParallelConfig(distributed_optimizer=True),
            Precision.BF16,
        )
    )
    moment = torch.tensor(start, dtype=torch.bfloat16)
    steps = int(torch.log(torch.tensor(0.5)) / torch.log(torch.tensor(beta2))) + 1
    for _ in range(steps):
        moment = (moment.float() * beta2).bfloat16()
    if allowed:
        assert float(moment) < 0.75 * start
    assert allowed == (beta2 <= 0.996)
    if beta2 == 0.999:
        assert float(moment) == float(torch.tensor(start).bfloat16()), "rounding holds it where it was"


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (Capabilities(gpu=False, engine_problem="x", apex_gradients=False, compiler_problem=None), "sees no GPU"),
        (Capabilities(gpu=True, engine_problem="no engine", apex_gradients=False, compiler_problem=None), "no engine"),
    ],
    ids=["cpu", "bare-gpu"],
)
def test_a_machine_without_the_optimizer_is_named(machine: Capabilities, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.moment_dtype: bf16 needs a GPU and .*{reason}; use fp32"):
        require_moments(LOW, machine)
    require_moments(OptimizerConfig(), machine)
    require_moments(LOW, H100)
